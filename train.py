"""The whole loop: SFT on worked solutions, then rounds of tree search and SVPO, then the table of answers.

    python train.py                                    built-in questions, a tiny model from scratch
    python train.py --model DIR --data FILE.jsonl      a real checkpoint on real questions

A run folder holds config.json, log.jsonl (one line an optimizer step) and a folder a stage (sft, round1, ...) with the
model in Hugging Face's layout, its trees and its eval.json. The same command, run again, goes on: finished stages and
searched questions are kept, an optimizer phase that was interrupted starts again.

Dimension key: M sampled tokens, E nodes of a pack.
"""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Question, StepTokenizer, arithmetic_tokenizer, is_built_in, keep_config, load_questions, parse_args, \
    read_json, read_template, read_trees, resume_trees, run_command, solution_tree, write_json, write_tree
from eval import AnswerConfig, answer_questions, forward_pack, grow_judged, print_table, rescore, sibling_accuracy
from mcts import SearchConfig, search_trees
from model import Llama, LlamaConfig, find_folder, load_model, save_model
from svpo import InputError, LossConfig, Tree, drop_unvisited, flag, pack, sibling_pairs, svpo_loss, weighted_mean

STRATEGIES = ("greedy", "sampled", "beam:1,5", "beam:3,5")
TINY = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05)


@dataclass(frozen=True)
class RunConfig:
    """What to train on, and where to write."""
    model: str = flag("tiny", "tiny (from scratch, built-in task only), a folder, a preset or a repository id")
    data: str = flag("arithmetic", "arithmetic (built in) or a JSONL file of training questions")
    test_data: str = flag("", "JSONL file of test questions; empty: the last fifth of --data is held out")
    prompt: str = flag("", "file with the text around {question}; empty: '{question}' and a line break")
    limit: int = flag(0, "use the first N questions of a JSONL file, held-out ones included; 0: all", least=0)
    test_limit: int = flag(500, "answer at most N test questions", least=1)
    sft_questions: int = flag(7000, "built-in task: worked solutions", least=1)
    search_questions: int = flag(4500, "built-in task: new questions a round, with answers only", least=1)
    valid_questions: int = flag(300, "built-in task: questions searched only to measure sibling accuracy", least=1)
    rounds: int = flag(1, "rounds of search and SVPO; AlphaMath: 3", built_in=2, least=0)
    out: str = flag("", "run folder; empty: runs/DATA-seedN")
    seed: int = flag(0, "seed of weights, questions, sampling and data order")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer. AlphaMath: lr 4e-5, cosine, warm-up 3 %, batch 1024, 10 epochs."""
    sft_steps: int = flag(0, "optimizer steps on worked solutions; 0: start from the model as it is", built_in=2000, least=0)
    sft_batch: int = flag(16, "solutions a step", built_in=32, least=1)
    sft_lr: float = flag(2e-5, "peak learning rate of SFT", built_in=3e-3, least=0)
    tune_epochs: int = flag(2, "passes over a round's trees", least=1)
    tune_batch: int = flag(4, "trees a step", built_in=8, least=1)
    tune_lr: float = flag(1e-5, "peak learning rate of SVPO", built_in=5e-4, least=0)
    row_tokens: int = flag(0, "pack trees into rows of this many tokens; the largest tree is the least", built_in=256, least=0)
    warmup: float = flag(0.03, "share of the steps with rising learning rate; cosine decay follows", least=0)
    weight_decay: float = flag(0.01, "AdamW's", least=0)
    clip: float = flag(1.0, "largest gradient norm", least=0)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    stages = parse_args(__doc__, (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig), argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("more than one process is not supported yet; start with python, not torchrun")
    run, train, search, losses, answering = stages
    if is_built_in(run.data) and run.data != "arithmetic":
        raise InputError(f"--data {run.data}: training takes all splits of the built-in task: --data arithmetic")
    if (run.model == "tiny") != (run.data == "arithmetic"):
        raise InputError("--model tiny and --data arithmetic go together; real questions need a real --model")
    splits = load_splits(run)
    folder = Path(run.out or f"runs/{Path(run.data).stem}-seed{run.seed}")
    model, tokenizer = load_start(run)
    check_splits(splits, tokenizer, model, train, search)
    open_run(folder, stages)
    rows, first = [], "sft" if train.sft_steps else "start"
    for number in range(run.rounds + 1):
        stage = folder / (f"round{number}" if number else first)
        stage.mkdir(exist_ok=True)
        if (stage / "config.json").exists():
            model = load_model(stage, run.device)
        elif stage.name != "start":  # the start is the model as it was given; it is not copied
            log = Log(folder / "log.jsonl", stage.name)
            if number:
                trees = grow_trees(model, tokenizer, splits, number, stage, run, search)
                tune(model, trees, train, losses, run.seed + number, log)
            else:
                sft(model, tokenizer, splits["sft"], train, run.seed, log)
            save_stage(model, tokenizer, stage, run)
        rows.append(evaluate(model, tokenizer, splits, stage, folder / first, run, search, answering))
        print_table(rows[-1:], f"after {stage.name}")
    print_table(rows, f"{folder}: {rows[0]['answers'][0]['questions']} unseen questions, seed {run.seed}; accuracy in %")


# --------------------------------------------------------------------------------------------- setting up

def load_splits(run: RunConfig) -> dict[str, list]:
    """Disjoint questions: sft (worked solutions), search (one list a round), valid (sibling accuracy) and test."""
    if run.data == "arithmetic":
        searched = load_questions("arithmetic:search", run.rounds * run.search_questions, run.seed)
        return {"sft": load_questions("arithmetic:sft", run.sft_questions, run.seed),
                "search": [searched[number::run.rounds] for number in range(run.rounds)],
                "valid": load_questions("arithmetic:valid", run.valid_questions), "test": load_questions("arithmetic:test", run.test_limit)}
    questions = load_questions(run.data, run.limit or None)
    if run.test_data:
        test = load_questions(run.test_data, run.test_limit)
    else:
        held_out = max(1, len(questions) // 5)
        questions, test = questions[:-held_out], questions[-held_out:][:run.test_limit]
        print(f"no --test-data: the last {held_out} questions of {run.data} are held out for the table")
    tested = {question.text for question in test}
    kept = [question for question in questions if question.text not in tested]
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept)} training questions also stand in the test set and are dropped")
    if not kept:
        raise InputError(f"{run.data}: no question is left for training")
    return {"sft": [question for question in kept if question.solution], "search": [kept] * run.rounds, "valid": [], "test": test}


def load_start(run: RunConfig) -> tuple[Llama, StepTokenizer]:
    """The model to start from, and its tokenizer with the prompt template."""
    template = read_template(run.prompt)
    if run.model == "tiny":
        tokenizer = StepTokenizer(arithmetic_tokenizer(), [0], template)
        config = LlamaConfig(vocab_size=tokenizer.tokenizer.get_vocab_size(), eos_token_id=0, **TINY)
        return Llama(config).init_weights(run.seed).to(run.device), tokenizer
    source = find_folder(run.model)
    tokenizer = StepTokenizer.load(source, template)  # first: it tells a tokenizer of another model by its size
    return load_model(source, run.device, seed=run.seed), tokenizer


def check_splits(splits: dict, tokenizer: StepTokenizer, model: Llama, train: TrainConfig, search: SearchConfig):
    """Refuse questions and solutions that do not fit, or SFT without solutions, before anything is written."""
    context = model.config.max_position_embeddings
    for question in [question for name in ("valid", "test") for question in splits[name]] + sum(splits["search"], []):
        tokenizer.encode_prompt(question, context - search.max_step_tokens)
    if train.sft_steps and not splits["sft"]:
        raise InputError("--sft-steps needs questions with worked solutions, and there is none")
    for question in splits["sft"] if train.sft_steps else []:
        length = sum(len(node.tokens) for node in solution_tree(question, tokenizer).nodes)
        if length > context:
            raise InputError(f"question {question.id}: prompt and solution have {length} tokens, the model's context {context}")


def open_run(folder: Path, stages: tuple):
    """Make the run folder, or check that it belongs to the same configuration."""
    if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    keep_config(folder / "config.json", stages, free=("out", "device"), commit=commit)


def save_stage(model: Llama, tokenizer: StepTokenizer, stage: Path, run: RunConfig):
    """Write the stage's model with its tokenizer; config.json comes last, so a folder that has it is complete."""
    if run.model == "tiny":
        tokenizer.tokenizer.save(str(stage / "tokenizer.json"))
        (stage / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}\n')
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                     "chat_template.jinja"):
            if (find_folder(run.model) / name).exists():
                shutil.copyfile(find_folder(run.model) / name, stage / name)
    save_model(model, stage)


class Log:
    """One JSON line an optimizer step. A stage that starts again forgets the lines of its first attempt."""
    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["stage"] != stage))

    def write(self, step: int, figures: dict):
        line = {"stage": self.stage, "step": step, **{name: float(f"{value:.6g}") for name, value in figures.items()}}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------------------------- training

def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear over the first `warmup` of the steps, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, steps - rising))))


def optimize(model: Llama, trees: list[Tree], steps: int, batch: int, lr: float, loss_of, train: TrainConfig, seed: int, log: Log):
    """AdamW over shuffled trees: `loss_of(logp_M, value_E, pack, trees)` returns the figures of a step, "loss" among them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=train.weight_decay)
    rng, order = random.Random(seed), []
    torch.manual_seed(seed)  # of dropout, so that a stage does not depend on what ran before it
    model.train()
    with tqdm(range(steps), desc=log.stage, unit="step", mininterval=1.0, dynamic_ncols=True) as bar:
        for step in bar:
            if len(order) < batch:
                order += rng.sample(range(len(trees)), len(trees))
            chosen, order = [trees[index] for index in order[:batch]], order[batch:]
            packed = pack(chosen, train.row_tokens)
            figures = loss_of(*forward_pack(model, packed), packed, chosen)
            if not torch.isfinite(figures["loss"]):
                raise InputError(f"{log.stage}, step {step}: the loss is {figures['loss'].item()}; lower the learning rate")
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps, train.warmup)
            optimizer.zero_grad()
            figures["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
            optimizer.step()
            shown = {name: value.item() for name, value in figures.items()} | {
                "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
            log.write(step, shown)
            bar.set_postfix_str(", ".join(f"{name} {shown[name]:.3f}" for name in ("loss", "policy", "mse") if name in shown))
    model.eval()


def sft(model: Llama, tokenizer: StepTokenizer, questions: list[Question], train: TrainConfig, seed: int, log: Log):
    """Supervised fine-tuning on worked solutions: each is a tree with one branch."""
    trees = [solution_tree(question, tokenizer) for question in questions]
    optimize(model, trees, train.sft_steps, train.sft_batch, train.sft_lr,
             lambda logp_M, value_E, packed, chosen: {"loss": -weighted_mean(logp_M)}, train, seed, log)


def tune(model: Llama, trees: list[Tree], train: TrainConfig, losses: LossConfig, seed: int, log: Log):
    """SVPO on a round's trees. The reference is the policy that grew them, by its recorded log-probabilities."""
    kept = [tree for tree in map(drop_unvisited, trees) if len(tree.nodes) > 1]
    if not kept:
        raise InputError(f"{log.stage}: no tree has a step to learn from; see --cache-tokens and --max-step-tokens")
    optimize(model, kept, max(1, train.tune_epochs * len(kept) // train.tune_batch), train.tune_batch, train.tune_lr,
             lambda logp_M, value_E, packed, chosen: svpo_loss(logp_M, value_E, packed, chosen, losses), train, seed, log)


def grow_trees(model: Llama, tokenizer: StepTokenizer, splits: dict, number: int, stage: Path, run: RunConfig,
               search: SearchConfig) -> list[Tree]:
    """Search the round's questions; each tree is written as it ends, and questions that have one are not searched again."""
    path = stage / "trees-0.jsonl"
    trees = resume_trees(stage / "trees.jsonl")
    done = {tree.id for tree in trees}
    left = [question for question in splits["search"][number - 1] if question.id not in done]
    with open(path, "a") as file:
        for tree in search_trees(model, tokenizer, left, search, run.seed + number, f"{stage.name} search"):
            write_tree(file, tree)
            trees.append(tree)
    describe(trees, tokenizer)
    return trees


def describe(trees: list[Tree], tokenizer: StepTokenizer):
    """Print what a search found, and one tree's best pair of siblings as an example."""
    outcomes = [[node.reward for node in tree.nodes if node.reward is not None] for tree in trees]
    pairs = [sibling_pairs(tree) for tree in trees]
    count = len(trees)
    print(f"{count} trees: {100 * sum(1 in found for found in outcomes) / count:.1f} % with a correct solution, "
          f"{sum(map(len, outcomes)) / count:.1f} finished solutions, {sum(map(len, pairs)) / count:.1f} pairs and "
          f"{sum(tree.simulations for tree in trees) / count:.1f} effective simulations a tree")
    tree, found = max(zip(trees, pairs), key=lambda item: (bool(item[1]), len(item[0].nodes)))
    win, lose, _ = max(found, key=lambda pair: tree.nodes[pair[0]].q_value - tree.nodes[pair[1]].q_value) if found else (
        min(1, len(tree.nodes) - 1), min(2, len(tree.nodes) - 1), 0)
    path = []
    parent = tree.nodes[win].parent
    while parent > 0:
        path.insert(0, tree.nodes[parent])
        parent = tree.nodes[parent].parent
    lines = [f"   question  {tree.question}"] + [f"       step  {tokenizer.tokenizer.decode(node.tokens).strip()}" for node in path]
    for label, index in (("+", win), ("-", lose)):
        node = tree.nodes[index]
        lines.append(f" {label if found else ' '} {'sibling':>8}  {tokenizer.tokenizer.decode(node.tokens).strip()}   "
                     f"(N {node.visit_count}, Q {node.q_value:+.2f}, V {node.value:+.2f})")
    print("\n".join(lines), flush=True)


# --------------------------------------------------------------------------------------------- measuring

def evaluate(model: Llama, tokenizer: StepTokenizer, splits: dict, stage: Path, first: Path, run: RunConfig,
             search: SearchConfig, answering: AnswerConfig) -> dict:
    """The stage's row of the table, from its eval.json where that exists.

    Sibling accuracy is measured twice: on validation trees that the stage's own policy grew, and on those of the
    `first` stage, which are the same pairs for every stage.
    """
    path = stage / "eval.json"
    if path.exists():
        return read_json(path)
    row = {"stage": stage.name, "answers": [answer_questions(model, tokenizer, splits["test"], strategy, search, answering, run.seed)
                                            for strategy in STRATEGIES]}
    if splits["valid"]:
        trees = grow_judged(model, tokenizer, splits["valid"], search, run.seed, f"{stage.name} sibling accuracy")
        row["siblings"] = sibling_accuracy(trees)
        fixed = first / "valid-trees.jsonl"
        if stage == first:
            with open(fixed, "w") as file:
                for tree in trees:
                    write_tree(file, tree)
        row["siblings_fixed"] = sibling_accuracy(rescore(model, read_trees(fixed)))
    write_json(path, row)
    return row


if __name__ == "__main__":
    run_command(main)
