"""SVPO, Step-level Value Preference Optimization (arXiv 2406.10858), in one file. Read it first.

A language model answers questions in steps, one line each. It learns which steps are good:
    1. SFT: imitate worked solutions.
    2. MCTS: for questions with only an answer, grow a tree of steps and see where each one leads.
    3. Pairs: of two steps after the same text, prefer the one that leads to right answers.
    4. Training: the policy learns these preferences, the value head what the search found out.
    5. SBS: answer by step-level beam search, led by the value head. More rounds would go back to 2.

`python minimal.py --seed 0` prints accuracy before and after. tests/test_minimal.py holds the fast
modules to it. Sources: AlphaMath (arXiv 2405.03553), its official code, DPO (arXiv 2305.18290), an
SVPO summary. Dimension key: B rows, T tokens, V vocabulary, N steps, C tokens of a step.
"""

import argparse
import random
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import load_questions
from model import Llama, LlamaConfig
from tasks.built_in import task_tokenizer
from tasks.grading import extract_answer, is_correct

# Modulo 7, the question `2+4*5-3` has the steps `4*5=6 -> 2+6-3`, `2+6=1 -> 1-3`, `1-3=5 #### 5`.
TASK, QUESTIONS = "arithmetic", {"sft": 6000, "search": 500, "test": 200}
TOKENIZER, EOS = task_tokenizer(TASK), 0  # digits, operators, " -> ", " #### ", "\n" are tokens
MODEL = TOKENIZER.get_vocab_size(), 64, 192, 4, 4, 2, 16  # in the order of LlamaConfig's fields
SIMULATIONS, EXPAND_WIDTH, C_PUCT, TEMPERATURE = 16, 5, 1.25, 1.0  # AlphaMath: 40 simulations
MAX_DEPTH, MAX_STEP_TOKENS, MIN_GAP, BETA, MARGIN = 5, 16, 0.5, 0.3, 0.5  # our choice, as are:
POLICY_WEIGHT, SFT_WEIGHT, MSE_WEIGHT, MARGIN_WEIGHT = 0.05, 1.0, 0.1, 0.05


@dataclass(eq=False)
class Node:
    """A step and the partial solution that it ends. The root is the question, without a step."""

    parent: "Node | None"
    state: list[int]  # tokens of the question and of all steps down to this one
    tokens: list[int] = field(default_factory=list)  # those of this step
    depth: int = 0
    ending: str | None = None  # "answer", "eos", "cut", "deep": terminal; None: goes on; "open"
    logp: float = 0.0  # log pi(tokens | state of the parent) of the policy that sampled them
    value: float = 0.0  # V(state), between -1 (it will end wrong) and 1 (right)
    children: list["Node"] = field(default_factory=list)
    visit_count: int = 0  # N
    q_value: float = 0.0  # Q, the mean of what was backed up through this step
    outcomes: list = field(default_factory=list)  # 1 or -1, of terminal steps at or below
    closed: bool = False  # everything below is terminal or closed


def read(model: Llama, nodes: list[Node]):
    """Of each node: logits after its state (B, V), log pi of its step (B,), V of its state (B,)."""
    last_B = torch.tensor([len(node.state) - 1 for node in nodes])
    longest = int(last_B.max()) + 1
    token_BT = torch.tensor([node.state + [EOS] * (longest - len(node.state)) for node in nodes])
    logits_BTV, value_BT = model(token_BT)  # attention is causal: no token sees the padding
    logp_BT = logits_BTV[:, :-1].log_softmax(dim=-1).gather(2, token_BT[:, 1:, None])[..., 0]
    behind_BT = last_B[:, None] - torch.arange(1, longest)  # tokens of the state behind each token
    own_BT = (behind_BT >= 0) & (behind_BT < torch.tensor([[len(node.tokens)] for node in nodes]))
    last = torch.arange(len(nodes)), last_B
    return logits_BTV[last], (logp_BT * own_BT).sum(dim=1), value_BT[last]  # probabilities multiply


def sft_loss(model: Llama, questions: list) -> dict:
    """1. SFT. Mean -log pi of tokens of worked solutions, half of which take a wrong order."""
    prompts = [TOKENIZER.encode(question.text + "\n").ids for question in questions]
    solutions = [TOKENIZER.encode(question.solution).ids + [EOS] for question in questions]
    nodes = [Node(None, prompt + tokens, tokens) for prompt, tokens in zip(prompts, solutions)]
    return {"total": -read(model, nodes)[1].sum() / sum(map(len, solutions))}


def train(model: Llama, items: list, losses, epochs: int, batch: int, peak_lr: float):
    """AdamW on random batches of questions or trees. `losses` gives the "total" and its terms."""
    updates = epochs * len(items) // batch
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for update in range(updates):
        decay = (1 + np.cos(np.pi * update / updates)) / 2
        optimizer.param_groups[0]["lr"] = peak_lr * min(decay, (update + 1) / (0.03 * updates))
        terms = losses(model, random.Random(update).sample(items, batch))
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        if update % 100 == 0:
            print(f"step {update}:", *(f"{name} {term:.3f}" for name, term in terms.items()))


@torch.inference_mode()
def sample_steps(model: Llama, parents: list[Node], temperature: float, rng) -> list[Node]:
    """Sample a step after each of N parents. Every token takes a full forward pass."""
    steps = [Node(node, list(node.state), [], node.depth + 1, "open") for node in parents]
    uniform_NC = torch.tensor(rng.random((len(steps), MAX_STEP_TOKENS)), dtype=torch.float32)
    while growing := [n for n, step in enumerate(steps) if step.ending == "open"]:
        logits_BV, _, _ = read(model, [steps[n] for n in growing])
        cumulative_BV = (logits_BV / max(temperature, 1e-8)).softmax(dim=-1).cumsum(dim=-1)
        target_B = uniform_NC[growing, len(steps[growing[0]].tokens)] * cumulative_BV[:, -1]
        token_B = (cumulative_BV[:, :-1] <= target_B[:, None]).sum(dim=1)  # the first above target
        for n, token in zip(growing, token_B.tolist()):
            steps[n].state.append(token)
            steps[n].tokens.append(token)
            steps[n].ending = ending_of(steps[n])
    _, logp_N, value_N = read(model, steps)
    for step, logp, value in zip(steps, logp_N.tolist(), value_N.tolist()):
        step.logp, step.value = logp, value
    return steps


def ending_of(step: Node) -> str | None:
    """Whether a step is complete, and ends the solution. None: the solution goes on."""
    text, stops = TOKENIZER.decode(step.tokens), step.tokens[-1] == EOS
    if not stops and "\n" not in text.lstrip():
        return "open" if len(step.tokens) < MAX_STEP_TOKENS else "cut"
    if extract_answer(text) is not None:  # what follows "####"
        return "answer"
    return "eos" if stops else "deep" if step.depth == MAX_DEPTH else None


def mcts(model: Llama, question, seed: int) -> Node:
    """2. MCTS (AlphaMath section 3.2). A simulation walks to a promising leaf, samples children,
    and backs up V of the leaf and outcomes of children that end. Others wait to be selected."""
    rng = np.random.default_rng([seed, zlib.crc32(question.id.encode())])
    ties = random.Random(f"{seed} {question.id}")
    root = Node(None, TOKENIZER.encode(question.text + "\n").ids)
    root.value = read(model, [root])[2].item()
    for _ in range(SIMULATIONS):
        if not (leaf := select(root, ties)):
            break
        steps = sample_steps(model, [leaf] * EXPAND_WIDTH, TEMPERATURE, rng)
        leaf.children = list({tuple(step.tokens): step for step in steps}.values())
        for child in leaf.children:
            if child.ending:
                answer = extract_answer(TOKENIZER.decode(child.tokens))
                right = child.ending == "answer" and is_correct(answer, question.answer)
                backup(child, 1 if right else -1, [1 if right else -1])
        backup(leaf, leaf.value, [])  # AlphaMath eq. 5: reward of terminal steps, V of others
    return root


def select(root: Node, ties: random.Random) -> Node | None:
    """Walk down by puct to a step without children. A step whose children are all terminal or
    closed is closed, and the walk starts again (our choice; the official code stops there)."""
    node = root
    while not root.closed:
        if not node.children:
            return node
        choices = [child for child in node.children if not child.ending and not child.closed]
        if choices:
            best = max(map(puct, choices))
            node = ties.choice([child for child in choices if puct(child) == best])
        else:
            node.closed = True
            node = root
    return None


def puct(step: Node) -> float:
    """AlphaMath eq. 4: Q + c_puct * prior * sqrt(N_parent) / (1 + N)."""
    prior = np.exp(step.logp / len(step.tokens))  # mean over tokens (official code)
    return step.q_value + C_PUCT * prior * step.parent.visit_count**0.5 / (1 + step.visit_count)


def backup(node: Node | None, value: float, outcomes: list):
    """Add an evaluation, and the outcome of a terminal step, to a step and to all above it."""
    while node:
        node.visit_count += 1
        node.q_value += (value - node.q_value) / node.visit_count
        node.outcomes += outcomes
        node = node.parent


def decided(parent: Node, sign: int) -> list[Node]:
    """Children whose Q has this sign, and which have a terminal step of this reward at or below."""
    return [step for step in parent.children if step.q_value * sign > 0 and sign in step.outcomes]


def step_pairs(parent: Node) -> list[tuple[Node, Node]]:
    """3. Pairs (winner, loser) of siblings, ranked by Q and filtered by outcome (SVPO summary)."""
    pairs = [(w, l) for w in decided(parent, 1) for l in decided(parent, -1)]
    pairs = [(w, l) for w, l in pairs if w.q_value - l.q_value >= MIN_GAP]
    return pairs + [pair for child in parent.children for pair in step_pairs(child)]


def svpo_losses(model: Llama, trees: list[Node]) -> dict:
    """4. Training. The loss of searched trees. (AlphaMath's dropout before V is left out here.)"""
    nodes = list(trees)
    for node in nodes:  # the list grows
        nodes += [child for child in node.children if child.visit_count]
    solved = [pairs for pairs in map(step_pairs, trees) if pairs]  # each such tree weighs the same
    pairs = [(*pair, 1 / len(pairs) / len(solved)) for pairs in solved for pair in pairs]
    logp, value = (dict(zip(nodes, x_B)) for x_B in read(model, nodes)[1:])
    # Implicit reward (DPO section 4). The reference is the policy that grew the trees.
    reward = {node: BETA * (logp[node] - node.logp) for node in nodes}
    # Preference (DPO eq. 7, on steps): the winner's implicit reward should exceed the loser's.
    policy = sum(weight * -F.logsigmoid(reward[w] - reward[l]) for w, l, weight in pairs)
    # Likelihood of right solutions (SVPO summary), a mean over tokens. They share steps.
    right = {node: node.outcomes.count(1) for node in nodes}
    tokens = sum(count * len(step.tokens) for step, count in right.items())
    sft = sum(count * -logp[step] for step, count in right.items()) / max(1, tokens)
    mse = sum((value[node] - node.q_value) ** 2 for node in nodes) / len(nodes)  # SVPO summary
    # Margin: V of the winner should exceed V of the loser by MARGIN (SVPO summary).
    margin = sum(weight * F.relu(MARGIN - (value[w] - value[l])) for w, l, weight in pairs)
    total = POLICY_WEIGHT * policy + SFT_WEIGHT * sft + MSE_WEIGHT * mse + MARGIN_WEIGHT * margin
    return {"total": total, "policy": policy, "sft": sft, "mse": mse, "margin": margin}


def sbs(model: Llama, question, beam_width: int, expand_width: int, temperature: float, seed: int):
    """5. SBS(B1, B2), AlphaMath algorithm 2: of B2 steps after each, keep the B1 of highest V."""
    rng = np.random.default_rng([seed, zlib.crc32(question.id.encode())])
    root, finished = Node(None, TOKENIZER.encode(question.text + "\n").ids), []
    parents = [root] * (beam_width * expand_width)
    while parents and len(finished) < beam_width:
        steps = sample_steps(model, parents, temperature, rng)
        useful = {tuple(s.state): s for s in steps if s.ending in (None, "answer")}.values()
        beam = sorted(useful, key=lambda step: -step.value)[: beam_width - len(finished)]
        finished += [step for step in beam if step.ending]  # they leave the beam and narrow it
        parents = [step for step in beam if not step.ending for _ in range(expand_width)]
    return TOKENIZER.decode(max(finished, key=lambda step: step.value, default=root).state)


def report(stage: str, model: Llama, questions: list, seed: int):
    """Print the share of right answers in %, with its standard error."""
    for name, *sizes in (("greedy", 1, 1, 0), ("SBS(1,5)", 1, 5, 0.3), ("SBS(3,5)", 3, 5, 0.3)):
        right = [
            is_correct(extract_answer(sbs(model, q, *sizes, seed)), q.answer) for q in questions
        ]
        error = np.std(right) / len(right) ** 0.5
        print(f"{stage:5} {name:9} {100 * np.mean(right):.1f} +- {100 * error:.1f}")


def main(seed: int):
    questions = {s: load_questions(f"{TASK}:{s}", n, seed) for s, n in QUESTIONS.items()}
    model = Llama(LlamaConfig(*MODEL, initializer_range=0.05)).init_weights(seed)
    train(model, questions["sft"], sft_loss, epochs=8, batch=32, peak_lr=3e-3)
    report("SFT", model, questions["test"], seed)
    trees = [mcts(model, question, seed) for question in questions["search"]]
    for step in next(filter(None, map(step_pairs, trees)), [()])[0]:  # an example
        print(f"Q {step.q_value:+.2f}:\n{TOKENIZER.decode(step.state)}")
    train(model, trees, svpo_losses, epochs=5, batch=8, peak_lr=1e-3)
    report("SVPO", model, questions["test"], seed)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, default=0)
    main(arguments.parse_args().seed)
