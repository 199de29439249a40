"""The sides that bench.py compares: ours, `transformers` generate, TRL's DPOTrainer. One measurement each.

The peer of search is the same MCTS (mcts.mcts) whose expansions call `generate` for all live questions in lock-step: each child's
prefix is fed again (num_return_sequences copies the prompt before the first pass), its own KV cache serves within the
call, each sequence stops at its line break, and its leaf values come free from the prompt pass. Budgets are equal;
the random numbers, and with them the trees, differ. Sampling: one solution of exactly as many tokens for each of 32
questions; we feed the prompt that they share once, the peer 32 times. Training: one pass over the step pairs of searched
trees, the prompt of their questions set anew by --prompt, at learning rate 0, so that all sides see the same losses; the
policy is the model with a little noise, the reference the model.
"""
import contextlib
import json
import math
import random
import re
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data import Question, SourceConfig, StepTokenizer, extract_answer, find_folder, find_source, load_questions, load_source, read_trees
from eval import majority, rescore, samples
from mcts import Driver, Node, SearchConfig, grader, mcts
from model import Llama, load_model
from svpo import InputError, Lesson, LossConfig, flag, learn, path
from train import TrainConfig, optimize


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""
    live: int = flag(8, "questions searched at once", least=1)
    questions: int = flag(16, "questions in all", least=1)
    sample_tokens: int = flag(128, "tokens sampled of each of 32 questions in the sampling comparison", least=1)
    alternations: int = flag(3, "measurements of each side", least=1)
    prompt_tokens: int = flag(0, "make each question's prompt at least about this long", least=0)
    trees: str = flag("", "train: file of searched trees of these questions")
    batch: int = flag(8, "train: pairs an optimizer step", least=1)
    side: str = flag("", "one measurement in this process")


def setting(source: SourceConfig, config: BenchConfig):
    """Model, tokenizer and questions: repeated where the file has too few, made longer where that is asked for."""
    model, tokenizer, found = load_source(source)
    questions = [replace(found[index % len(found)], id=str(index)) for index in range(config.questions)]
    for index, question in enumerate(questions):
        missing = config.prompt_tokens - len(tokenizer.encode_prompt(question))
        questions[index] = replace(question, text=f"{index} " + "and so on " * (max(0, missing) // 3) + question.text)
    return model, tokenizer, questions


def reset_peak():
    """Forget the peak memory of loading (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def report(begin: float, device: str, nodes: int, tokens: int, **more) -> dict:
    """Figures of a measurement; peak memory of the process since `reset_peak`, or of the CUDA device."""
    seconds = time.perf_counter() - begin
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
        peak = int(found[1]) / 1024 if found else math.nan
    return {"seconds": seconds, "nodes": nodes, "sampled_tokens": tokens, "peak_mb": peak, **more}


def search_ours(source: SourceConfig, config: BenchConfig, search: SearchConfig, watch=contextlib.nullcontext()) -> dict:
    model, tokenizer, questions = setting(source, config)
    reset_peak()
    begin = time.perf_counter()
    with watch:
        driver = Driver(model, tokenizer, questions, config.live, search.expand_width, search.search_temperature, search,
                        search.simulations, source.seed)
        tick, ticks = driver.tick, []
        driver.tick = lambda: ticks.append(tick())
        simulations = sum(end[0] for _, _, end in driver.run(lambda question, root: mcts(
            root, search, grader(question), random.Random(question.id)), "ours"))
    return report(begin, source.device, driver.steps, driver.sampled_tokens, fed_tokens=driver.fed_tokens, simulations=simulations,
                  ticks=len(ticks), prompt_tokens=len(tokenizer.encode_prompt(questions[0])))


class Peer:
    """Lock-step batches of `generate` over the live questions."""
    def __init__(self, source: SourceConfig, model: Llama, tokenizer: StepTokenizer, config: BenchConfig):
        from transformers import AutoModelForCausalLM
        self.head = model.value_head
        model.model = None  # its memory is not the peer's
        self.model = AutoModelForCausalLM.from_pretrained(find_folder(source.model), dtype=getattr(torch, source.dtype)).to(source.device).eval()
        self.tokenizer, self.config, self.tables_V4 = tokenizer, config, tokenizer.tables_4V.T.tolist()
        self.model.model.norm.register_forward_hook(self.keep_hidden)
        self.sampled_tokens = self.fed_tokens = self.nodes = 0

    def keep_hidden(self, module, inputs, hidden_BTD):
        if hidden_BTD.shape[1] > 1:  # the prompt pass: every value costs it nothing
            self.prompt_value = torch.tanh(self.head(hidden_BTD[:, -1]).squeeze(-1)).tolist()

    def generate(self, prefixes: list[list[int]], copies: int, new_tokens: int, temperature: float, steps: bool):
        """New tokens of each copy and their log-probabilities; with `steps` each ends at its line break."""
        tables = self.tokenizer.tables_4V.to(self.model.device)
        longest, has_text, logp, last = max(map(len, prefixes)), None, [], None
        ids = torch.tensor([[0] * (longest - len(prefix)) + prefix for prefix in prefixes], device=self.model.device)
        attention = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes], device=self.model.device)

        def keep_logits(input_ids, scores):  # log-probabilities at the price of one logsumexp, not of all logits kept
            nonlocal last
            if last is not None:
                logp.append(last[0].gather(1, input_ids[:, -1:])[:, 0] - last[1])
            last = scores.clone(), scores.logsumexp(dim=-1)
            scores[:, tables.shape[1]:] = -math.inf  # ids that the tokenizer does not have
            return scores

        def step_ends(input_ids, scores, **more):
            nonlocal has_text
            eos, breaks, text, before = tables[:, input_ids[:, -1]]
            has_text = text.new_zeros(text.shape) if has_text is None else has_text
            done = eos | breaks & (has_text | before)
            has_text = has_text | text
            return done
        out = self.model.generate(
            input_ids=ids, attention_mask=attention, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            num_return_sequences=copies, max_new_tokens=new_tokens, min_new_tokens=None if steps else new_tokens, pad_token_id=0,
            eos_token_id=None, logits_processor=[keep_logits], stopping_criteria=[step_ends] if steps else None)
        logp.append(last[0].gather(1, out[:, -1:])[:, 0] - last[1])
        self.fed_tokens += out.shape[0] * (out.shape[1] - 1)  # each copy's prompt is fed, padded to the longest
        return out[:, longest:].tolist(), torch.stack(logp, dim=1).tolist()

    def search(self, questions: list[Question], search: SearchConfig):
        """The same generators, fed in lock-step."""
        waiting, live, simulations = list(questions)[::-1], [], 0
        while waiting or live:
            while waiting and len(live) < self.config.live:
                question = waiting.pop()
                root = Node(tokens=self.tokenizer.encode_prompt(question))
                generator = mcts(root, search, grader(question), random.Random(question.id))
                live.append((root, generator, next(generator)))
            leaves = [wanted[0] for _, _, wanted in live]
            prefixes = [sum((node.tokens for node in leaf.path()), root.tokens) for (root, _, _), leaf in zip(live, leaves)]
            texts, logps = self.generate(prefixes, search.expand_width, search.max_step_tokens, search.search_temperature, True)
            for index, leaf in enumerate(leaves):
                leaf.value = self.prompt_value[index * search.expand_width]
            following = []
            for index, (root, generator, wanted) in enumerate(live):
                rows = slice(index * search.expand_width, (index + 1) * search.expand_width)
                children = [self.child(wanted[0], *pair) for pair in zip(texts[rows], logps[rows])]
                try:
                    following.append((root, generator, generator.send(children)))
                except StopIteration as end:
                    simulations += end.value[0]
            live = following
        return simulations

    def child(self, parent: Node, tokens: list[int], logp: list[float]) -> Node:
        """A node of the tokens up to the step's end."""
        seen, count, eos = False, len(tokens), False
        for index, token in enumerate(tokens):
            eos, breaks, text, before = self.tables_V4[token]
            if eos or breaks and (seen or before):
                count = index + 1
                break
            seen |= text
        else:
            eos = None
        node = Node(parent, tokens[:count], sum(logp[:count]), text=self.tokenizer.tokenizer.decode(tokens[:count]))
        node.ending = "cut" if eos is None else "answer" if extract_answer(node.text) else "eos" if eos else None
        self.sampled_tokens += count
        self.nodes += 1
        return node


def search_peer(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    model, tokenizer, questions = setting(source, config)
    peer = Peer(source, model, tokenizer, config)
    torch.manual_seed(source.seed)
    reset_peak()
    begin = time.perf_counter()
    with torch.inference_mode():
        simulations = peer.search(questions, search)
    return report(begin, source.device, peer.nodes, peer.sampled_tokens, fed_tokens=peer.fed_tokens, simulations=simulations)


def sample_ours(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    """32 questions, one sample of exactly `sample_tokens` tokens each."""
    model, tokenizer, questions = setting(source, replace(config, questions=32))
    tokenizer.tables_4V[:2] = False  # nothing ends early
    reset_peak()
    begin = time.perf_counter()
    whole = replace(search, max_step_tokens=config.sample_tokens, max_depth=1, cache_tokens=32 * 4096)
    driver = Driver(model, tokenizer, questions, 32, 1, search.search_temperature, whole, 1, source.seed)
    list(driver.run(lambda question, root: samples(root, 1, majority), "ours"))
    return report(begin, source.device, driver.steps, driver.sampled_tokens, fed_tokens=driver.fed_tokens)


def sample_peer(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    model, tokenizer, questions = setting(source, replace(config, questions=32))
    peer = Peer(source, model, tokenizer, config)
    torch.manual_seed(source.seed)
    reset_peak()
    begin = time.perf_counter()
    with torch.inference_mode():
        texts, _ = peer.generate([tokenizer.encode_prompt(question) for question in questions], 1, config.sample_tokens,
                                 search.search_temperature, False)
    return report(begin, source.device, len(texts), sum(map(len, texts)), fed_tokens=peer.fed_tokens)


def pairs_of(source: SourceConfig, config: BenchConfig) -> list[Lesson]:
    """The trees that have pairs, under the prompt of this command; every pair weighs 1."""
    _, tokenizer = find_source(source)
    questions = {question.id: question for question in load_questions(source.data)}
    lessons = []
    for tree in read_trees(config.trees):
        if tree.id not in questions:
            raise InputError(f"{config.trees}: question {tree.id} is not among those of --data {source.data}")
        lesson = learn(tokenizer.set_prompt(tree, questions[tree.id]), LossConfig("step-dpo"))
        lessons += [replace(lesson, pairs=[(win, lose, 1.0) for win, lose, _ in lesson.pairs])] if lesson.pairs else []
    if not lessons:
        raise InputError(f"{config.trees}: no tree has a pair")
    return lessons


def steps_of(lessons: list[Lesson], config: BenchConfig) -> int:
    """Optimizer steps of about `batch` pairs, each of one tree at least."""
    return min(len(lessons), -(-sum(len(lesson.pairs) for lesson in lessons) // config.batch))


def disturb(model):
    """A little noise, the same for the same parameter names: a policy that is not its reference."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            parameter.add_(0.02 * parameter.std(correction=0) * noise.to(parameter.device))


def train_ours(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    lessons = pairs_of(source, config)
    count = sum(len(lesson.pairs) for lesson in lessons)
    steps = steps_of(lessons, config)
    model = load_model(find_folder(source.model), source.device)
    reset_peak()
    begin = time.perf_counter()
    lessons = [replace(lesson, tree=tree) for lesson, tree in zip(lessons, rescore(model, [lesson.tree for lesson in lessons]))]
    reference = time.perf_counter() - begin
    disturb(model)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "stage"
        stage.mkdir()
        optimize(model, steps, 0.0, lambda step: list(enumerate(lessons))[step::steps], LossConfig("step-dpo", policy_weight=1.0),
                 TrainConfig(), 0, stage)
        rows = [json.loads(line) for line in open(stage.parent / "log.jsonl")]
    tokens = sum(len(node.tokens) for lesson in lessons for node in lesson.tree.nodes)
    return report(begin, source.device, 0, 0, reference=reference, processed=tokens, pairs=count, trees=len(lessons),
                  loss=sum(row["loss"] * row["pairs"] for row in rows) / count)


def train_trl(source: SourceConfig, config: BenchConfig, search: SearchConfig, precompute: bool = False) -> dict:
    """DPOTrainer with its own collator, fed the token ids of the same pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    folder, rows, lessons = find_folder(source.model), [], pairs_of(source, config)
    for lesson in lessons:
        nodes = lesson.tree.nodes
        for win, lose, _ in lesson.pairs:
            prompt = sum((nodes[index].tokens for index in [0, *path(lesson.tree, nodes[win[-1]].parent)]), [])
            rows.append({"prompt_ids": prompt, "chosen_ids": nodes[win[-1]].tokens, "rejected_ids": nodes[lose[-1]].tokens})
    policy, *reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(1 if precompute else 2))
    figures = {"processed": 0, "loss": 0.0, "reference": 0.0}

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *more):
            return dataset  # token ids already

        def _precompute_ref_logps(self, *more):
            begin = time.perf_counter()
            found = super()._precompute_ref_logps(*more)
            figures["reference"] += time.perf_counter() - begin
            return found

        def compute_loss(self, model, inputs, *more, **named):
            found = super().compute_loss(model, inputs, *more, **named)
            figures["processed"] += int(inputs["attention_mask"].sum())
            figures["loss"] += found.item() * len(inputs["input_ids"]) / 2 / len(rows)
            return found
    with tempfile.TemporaryDirectory() as out:
        words = DPOConfig(output_dir=out, per_device_train_batch_size=-(-len(rows) // steps_of(lessons, config)), num_train_epochs=1, learning_rate=0.0, beta=0.3, bf16=False,
                          gradient_checkpointing=False, max_length=None, precompute_ref_log_probs=precompute, report_to="none",
                          save_strategy="no", logging_strategy="no", use_cpu=source.device == "cpu", disable_tqdm=True)
        reset_peak()
        trainer = Trainer(policy, *reference, args=words, train_dataset=Dataset.from_list(rows),
                          processing_class=AutoTokenizer.from_pretrained(folder))  # computes the reference here, or not
        disturb(policy)
        begin = time.perf_counter()
        trainer.train()
    return report(begin, source.device, 0, 0, pairs=len(rows), trees=0, **figures)


SIDES = {"ours": search_ours, "peer": search_peer, "sample-ours": sample_ours, "sample-peer": sample_peer, "train-ours": train_ours,
         "trl": train_trl, "trl-precomputed": partial(train_trl, precompute=True)}
