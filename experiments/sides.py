"""The sides that bench.py compares: this program, transformers, vLLM, and DPOTrainer of TRL.

- Search: the peer runs the same MCTS (mcts.mcts). It expands all live questions in lock-step with
  one call of `generate`, which feeds each child's prefix again and copies a prompt before its first
  pass. A KV cache serves within the call, each sequence stops at its line break, and the values of
  leaves come free from the prompt pass. Budgets are equal. The random numbers differ, and so do the
  trees. vLLM does the same with its own `generate` and its prefix cache. Its V is 0, and its steps
  end at the first line break, also where that is their first token: its trees may be smaller.
- Sampling: one solution of exactly as many tokens for each of 32 questions. We feed the prompt that
  they share once, the peer 32 times.
- `--ladder`: our side with one of its optimisations switched off at a time (`LADDER`).
- Training: one pass over the step pairs of searched trees, at learning rate 0, so that all sides
  see the same losses. --prompt sets the prompt of the trees anew. The policy is the model with a
  little noise, the reference is the model.

Dimension key: X sequences of a batch of the peer, T tokens, D width, V vocabulary; of a cache
L layers, P tokens of the common prefix, G key heads, K head width.
"""

import contextlib
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import engine
from data import (
    Question,
    SourceConfig,
    StepTokenizer,
    find_source,
    load_questions,
    outcome_of,
    read_trees,
)
from engine import Demand, Engine, Node, TreeCache, load_source
from eval import majority, samples
from mcts import SearchConfig, demand_of, mcts
from model import Llama, LlamaConfig, load_model
from support import ranks
from support.flags import InputError, flag
from support.hugging_face import find_folder
from svpo import Lesson, LossConfig, learn, rescore
from tasks.grading import extract_answer
from train import TrainConfig, optimize


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    live: int = flag(8, "questions searched at once", least=1)
    questions: int = flag(16, "questions in all", least=1)
    sample_tokens: int = flag(
        128, "tokens sampled of each of 32 questions in the sampling comparison", least=1
    )
    alternations: int = flag(3, "measurements of each side", least=1)
    prompt_tokens: int = flag(0, "make each question's prompt at least about this long", least=0)
    trees: str = flag("", "train: file of searched trees of these questions")
    batch: int = flag(8, "train: pairs an optimizer step", least=1)
    vllm: bool = flag(False, "search: against vLLM, too (experiments/requirements-vllm.txt)")
    ladder: bool = flag(False, "search: what each optimisation of ours is worth, no other peer")
    side: str = flag("", "one measurement in this process")


# ---------------------------------------------------------------------------------------- measuring


def setting(
    source: SourceConfig, config: BenchConfig
) -> tuple[Llama, StepTokenizer, list[Question]]:
    """Model, tokenizer and questions.

    Questions are repeated if the file has too few, and get longer texts if --prompt-tokens asks for
    them.
    """
    model, tokenizer, found = load_source(source, 0, "train")
    questions = []
    for index in range(config.questions):
        question = replace(found[index % len(found)], id=str(index))
        missing = max(0, config.prompt_tokens - len(tokenizer.encode_prompt(question)))
        text = f"{index} " + "and so on " * (missing // 3) + question.text
        questions.append(replace(question, text=text))
    return model, tokenizer, questions


def reset_peak():
    """Forget the peak memory of loading (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def report(begin: float, device: str, nodes: int, tokens: int, **more) -> dict:
    """The figures of a measurement that began at `begin`.

    Peak memory is that of the process since `reset_peak`, or that of the CUDA device.
    """
    seconds = time.perf_counter() - begin
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
        peak = int(found[1]) / 1024 if found else math.nan
    return {"seconds": seconds, "nodes": nodes, "sampled_tokens": tokens, "peak_mb": peak, **more}


# -------------------------------------------------------------------------------- search, our side


def search_ours(
    source: SourceConfig, config: BenchConfig, search: SearchConfig, watch=None
) -> dict:
    """Our search. `watch` is a context manager to run it in."""
    model, tokenizer, questions = setting(source, config)
    reset_peak()
    begin = time.perf_counter()
    ticks = 0
    with watch or contextlib.nullcontext():
        demand = demand_of(search)
        engine = Engine(model, tokenizer, questions, demand, search, config.live, source.seed)
        decode = engine.decode

        def counted_decode():
            nonlocal ticks
            ticks += 1
            decode()

        def start(question, root):
            return mcts(root, search, outcome_of(question), random.Random(question.id))

        engine.decode = counted_decode
        simulations = sum(result[0] for _, _, result in engine.run(start, "ours"))
    return report(
        begin,
        source.device,
        engine.steps,
        engine.sampled_tokens,
        fed_tokens=engine.fed_tokens,
        simulations=simulations,
        ticks=ticks,
        prompt_tokens=len(tokenizer.encode_prompt(questions[0])),
    )


def sample_ours(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    """32 questions, one sample of exactly `sample_tokens` tokens each."""
    model, tokenizer, questions = setting(source, replace(config, questions=32))
    tokenizer.tables_4V[:2] = False  # nothing ends early
    reset_peak()
    begin = time.perf_counter()
    whole = replace(
        search, max_step_tokens=config.sample_tokens, max_depth=1, cache_tokens=32 * 4096
    )
    demand = Demand(1, search.search_temperature, expansions=1)
    engine = Engine(model, tokenizer, questions, demand, whole, 32, source.seed)
    list(engine.run(lambda question, root: samples(root, 1, majority), "ours"))
    fed = engine.fed_tokens
    return report(begin, source.device, engine.steps, engine.sampled_tokens, fed_tokens=fed)


# ------------------------------------------------------------------------------------ search, peer


class LogpKeeper:
    """A logits processor of `generate` that keeps the log-probability of each sampled token.

    That takes one logsumexp a token. The logits of earlier tokens are not kept.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary  # the tokenizer has no ids from here on
        self.logp_X = []  # one tensor for each token
        self.newest = None  # logits of the token that is sampled next, and their logsumexp

    def __call__(self, token_XT: Tensor, logits_XV: Tensor) -> Tensor:
        if self.newest:
            self.keep(token_XT[:, -1:])
        self.newest = (logits_XV.clone(), logits_XV.logsumexp(dim=-1))
        logits_XV[:, self.vocabulary :] = -math.inf
        return logits_XV

    def keep(self, token_X1: Tensor):
        """Keep the log-probabilities of the tokens that were sampled from the newest logits."""
        logits_XV, total_X = self.newest
        self.logp_X.append(logits_XV.gather(1, token_X1)[:, 0] - total_X)


class StepEnd:
    """A stopping criterion of `generate`: each sequence stops at its line break or end-of-text."""

    def __init__(self, tables_4V: Tensor):
        self.tables_4V = tables_4V
        self.has_text_X = False

    def __call__(self, token_XT: Tensor, scores, **more) -> Tensor:
        eos_X, may_end_X, text_X, text_before_X = self.tables_4V[:, token_XT[:, -1]]
        done_X = eos_X | may_end_X & (self.has_text_X | text_before_X)
        self.has_text_X = self.has_text_X | text_X
        return done_X


class Peer:
    """Batches of `generate` over the live questions, in lock-step."""

    def __init__(
        self, source: SourceConfig, model: Llama, tokenizer: StepTokenizer, config: BenchConfig
    ):
        self.value_head = model.value_head
        model.model = None  # its memory is not the peer's
        self.model = self.load(source, model.config)
        self.tokenizer = tokenizer
        self.config = config
        self.tables_V4 = tokenizer.tables_4V.T.tolist()
        self.sampled_tokens = 0
        self.fed_tokens = 0
        self.nodes = 0

    def load(self, source: SourceConfig, shape: LlamaConfig):
        """The peer's own copy of the model."""
        from transformers import AutoModelForCausalLM

        folder = find_folder(source.model)
        dtype = getattr(torch, source.dtype)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        peer.model.norm.register_forward_hook(self.read_values)
        return peer.to(source.device).eval()

    def read_values(self, module, inputs, hidden_XTD: Tensor):
        """Read V at the end of each prompt. In the prompt pass it costs nothing."""
        if hidden_XTD.shape[1] > 1:
            self.prompt_value = self.value_head(hidden_XTD[:, -1]).tolist()

    def generate(
        self,
        prefixes: list[list[int]],
        copies: int,
        new_tokens: int,
        temperature: float,
        step: bool,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The new tokens of each copy, and their log-probabilities.

        With `step` each copy ends at its line break; otherwise all have `new_tokens`.
        """
        device = self.model.device
        tables_4V = self.tokenizer.tables_4V.to(device)
        longest = max(map(len, prefixes))
        tokens = [[0] * (longest - len(prefix)) + prefix for prefix in prefixes]
        mask = [[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes]
        keeper = LogpKeeper(tables_4V.shape[1])
        found_XT = self.model.generate(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=copies,
            max_new_tokens=new_tokens,
            min_new_tokens=None if step else new_tokens,
            pad_token_id=0,
            eos_token_id=None,
            logits_processor=[keeper],
            stopping_criteria=[StepEnd(tables_4V)] if step else None,
        )
        keeper.keep(found_XT[:, -1:])
        # each copy's prompt is fed, padded to the longest
        self.fed_tokens += found_XT.shape[0] * (found_XT.shape[1] - 1)
        return found_XT[:, longest:].tolist(), torch.stack(keeper.logp_X, dim=1).tolist()

    def search(self, questions: list[Question], search: SearchConfig) -> int:
        """Search all questions; returns the number of simulations."""
        waiting = questions[::-1]
        live = []  # (generator, the leaf that it wants extended)
        simulations = 0
        while waiting or live:
            while waiting and len(live) < self.config.live:
                question = waiting.pop()
                root = Node(tokens=self.tokenizer.encode_prompt(question))
                rng = random.Random(question.id)
                generator = mcts(root, search, outcome_of(question), rng)
                live.append((generator, next(generator)[0]))
            families = self.expand([leaf for _, leaf in live], search)
            following = []
            for (generator, _), children in zip(live, families):
                try:
                    following.append((generator, generator.send(children)[0]))
                except StopIteration as end:
                    simulations += end.value[0]
            live = following
        return simulations

    def expand(self, leaves: list[Node], search: SearchConfig) -> list[list[Node]]:
        """The sampled children of each leaf, from one call of `generate` for all."""
        width = search.expand_width
        prefixes = [prefix_tokens(leaf) for leaf in leaves]
        texts, logps = self.generate(
            prefixes, width, search.max_step_tokens, search.search_temperature, step=True
        )
        families = []
        for number, leaf in enumerate(leaves):
            copies = slice(number * width, (number + 1) * width)
            leaf.value = self.prompt_value[copies.start]
            families.append([self.child(leaf, *copy) for copy in zip(texts[copies], logps[copies])])
        return families

    def child(self, parent: Node, tokens: list[int], logp: list[float]) -> Node:
        """A node of the tokens up to the step's end."""
        count = len(tokens)
        has_text = False
        ending = "cut"
        for index, token in enumerate(tokens):
            eos, may_end, text, text_before = self.tables_V4[token]
            if eos or may_end and (has_text or text_before):
                count = index + 1
                ending = "eos" if eos else None
                break
            has_text |= text
        decoded = self.tokenizer.tokenizer.decode(tokens[:count])
        if ending != "cut" and extract_answer(decoded):
            ending = "answer"
        self.sampled_tokens += count
        self.nodes += 1
        return Node(parent, tokens[:count], sum(logp[:count]), ending=ending, text=decoded)


def prefix_tokens(leaf: Node) -> list[int]:
    """The tokens of a partial solution, the prompt's included."""
    path = leaf.path()
    root = path[0].parent if path else leaf
    return root.tokens + [token for node in path for token in node.tokens]


class VllmPeer(Peer):
    """The same with vLLM's `generate`, which caches prefixes."""

    def load(self, source: SourceConfig, shape: LlamaConfig):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"--vllm: {error} (pip install -r experiments/requirements-vllm.txt)")
        return LLM(
            str(find_folder(source.model)),
            dtype=source.dtype,
            enable_prefix_caching=True,
            max_model_len=min(4096, shape.max_position_embeddings),
            seed=source.seed,
        )

    def generate(self, prefixes, copies, new_tokens, temperature, step):
        """As `Peer.generate`. Of prompt tokens, those that were not cached count as fed."""
        from vllm import SamplingParams

        words = SamplingParams(
            n=copies,
            temperature=temperature,
            max_tokens=new_tokens,
            ignore_eos=not step,
            stop=["\n"] if step else None,
            include_stop_str_in_output=True,
            logprobs=0,  # that of the sampled token alone
        )
        asked = [{"prompt_token_ids": prefix} for prefix in prefixes]
        texts, logps = [], []
        for found in self.model.generate(asked, words, use_tqdm=False):
            self.fed_tokens += len(found.prompt_token_ids) - (found.num_cached_tokens or 0)
            for one in found.outputs:
                tokens = list(one.token_ids)
                texts.append(tokens)
                pairs = zip(tokens, one.logprobs)
                logps.append([of_token[token].logprob for token, of_token in pairs])
                self.fed_tokens += len(tokens)
        self.prompt_value = [0.0] * len(texts)
        return texts, logps


def search_peer(
    source: SourceConfig, config: BenchConfig, search: SearchConfig, kind: type = Peer
) -> dict:
    """The peer's search."""
    model, tokenizer, questions = setting(source, config)
    peer = kind(source, model, tokenizer, config)
    torch.manual_seed(source.seed)
    reset_peak()
    begin = time.perf_counter()
    with torch.inference_mode():
        simulations = peer.search(questions, search)
    return report(
        begin,
        source.device,
        peer.nodes,
        peer.sampled_tokens,
        fed_tokens=peer.fed_tokens,
        simulations=simulations,
    )


def sample_peer(
    source: SourceConfig, config: BenchConfig, search: SearchConfig, kind: type = Peer
) -> dict:
    """The same 32 samples by the peer."""
    model, tokenizer, questions = setting(source, replace(config, questions=32))
    peer = kind(source, model, tokenizer, config)
    torch.manual_seed(source.seed)
    reset_peak()
    begin = time.perf_counter()
    prompts = [tokenizer.encode_prompt(question) for question in questions]
    with torch.inference_mode():
        texts, _ = peer.generate(
            prompts, 1, config.sample_tokens, search.search_temperature, step=False
        )
    sampled = sum(map(len, texts))
    return report(begin, source.device, len(texts), sampled, fed_tokens=peer.fed_tokens)


# ---------------------------------------------------------------------------------------- training


def read_pairs(source: SourceConfig, config: BenchConfig) -> list[Lesson]:
    """Lessons of the trees that have pairs, under the prompt of this command.

    Every pair weighs 1. InputError if a tree is of no question, or if no tree has a pair.
    """
    _, tokenizer = find_source(source)
    found = load_questions(source.data, data_dir=source.data_dir)
    questions = {question.id: question for question in found}
    lessons = []
    for tree in read_trees(config.trees):
        if tree.id not in questions:
            raise InputError(
                f"{config.trees}: question {tree.id} is not among those of --data {source.data}"
            )
        lesson = learn(tokenizer.set_prompt(tree, questions[tree.id]), LossConfig("step-dpo"))
        if lesson.pairs:
            pairs = [(win, lose, 1.0) for win, lose, _ in lesson.pairs]
            lessons.append(replace(lesson, pairs=pairs))
    if not lessons:
        raise InputError(f"{config.trees}: no tree has a pair")
    return lessons


def count_pairs(lessons: list[Lesson]) -> int:
    """The number of pairs in some lessons."""
    return sum(len(lesson.pairs) for lesson in lessons)


def count_steps(lessons: list[Lesson], config: BenchConfig) -> int:
    """Optimizer steps of about `batch` pairs, each of one tree at least."""
    return min(len(lessons), math.ceil(count_pairs(lessons) / config.batch))


def disturb(model: torch.nn.Module):
    """Add a little noise, so that the policy is not its reference.

    It is the same for the same names of parameters.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.02 * parameter.std(correction=0) * noise)


def train_ours(source: SourceConfig, config: BenchConfig, search: SearchConfig) -> dict:
    """Our training on packed trees, after one pass for the reference."""
    lessons = read_pairs(source, config)
    count = count_pairs(lessons)
    steps = count_steps(lessons, config)
    model = load_model(find_folder(source.model), source.device)
    reset_peak()
    begin = time.perf_counter()
    trees = rescore(model, [lesson.tree for lesson in lessons])
    lessons = [replace(lesson, tree=tree) for lesson, tree in zip(lessons, trees)]
    reference = time.perf_counter() - begin
    disturb(model)
    losses = LossConfig("step-dpo", policy_weight=1.0)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "stage"
        stage.mkdir()
        placed = list(enumerate(lessons))
        optimize(
            model, model, steps, 0.0, lambda n: placed[n::steps], losses, TrainConfig(), 0, stage
        )
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return report(
        begin,
        source.device,
        0,
        0,
        reference=reference,
        processed=sum(tree.tokens() for tree in trees),
        pairs=count,
        trees=len(lessons),
        loss=sum(row["loss"] * row["pairs"] for row in rows) / count,
    )


def train_trl(
    source: SourceConfig, config: BenchConfig, search: SearchConfig, precompute: bool = False
) -> dict:
    """DPOTrainer with its own collator, fed the token ids of the same pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_folder(source.model)
    lessons = read_pairs(source, config)
    rows = [row for lesson in lessons for row in pair_rows(lesson)]
    batch = math.ceil(len(rows) / count_steps(lessons, config))
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = None
    if not precompute:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures = {"processed": 0, "loss": 0.0, "reference": 0.0}
    trainer_class = counting_trainer(figures, len(rows))
    with tempfile.TemporaryDirectory() as out:
        words = trl_config(out, batch, precompute, source.device)
        reset_peak()
        trainer = trainer_class(
            policy,
            reference,
            args=words,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # with `precompute` it has computed the reference by now
        disturb(policy)
        begin = time.perf_counter()
        trainer.train()
    return report(begin, source.device, 0, 0, pairs=len(rows), trees=0, **figures)


def pair_rows(lesson: Lesson) -> list[dict]:
    """The pairs of a lesson as DPOTrainer takes them."""
    nodes = lesson.tree.nodes
    rows = []
    for win, lose, _ in lesson.pairs:
        prefix = [0, *lesson.tree.path(nodes[win].parent)]
        prompt = [token for index in prefix for token in nodes[index].tokens]
        chosen, rejected = nodes[win].tokens, nodes[lose].tokens
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def counting_trainer(figures: dict, pairs: int) -> type:
    """DPOTrainer that takes token ids, and adds up tokens, mean loss and seconds in `figures`."""
    from trl import DPOTrainer

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
            figures["loss"] += found.item() * len(inputs["input_ids"]) / 2 / pairs
            return found

    return Trainer


def trl_config(out: str, batch: int, precompute: bool, device: str):
    """The configuration of DPOTrainer: float32, learning rate 0, nothing written."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=out,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=0.0,
        beta=0.3,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        precompute_ref_log_probs=precompute,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )


# ---------------------------------------------------------------------------- the ladder, our side


class NoTreeCache(Engine):
    """An engine that computes the keys of the paths it extends again, as without a cache of the
    tree. They are not used: the search goes on as it would have."""

    def load_paths(self, row: int, parents: list[Node]) -> dict[Node, list[int]]:
        paths = [prefix_tokens(parent) for parent in set(parents)]
        kind = (self.device, self.model.output_weight().dtype)
        cache = TreeCache(self.model.config, len(paths), max(map(len, paths)), 0, *kind)
        cache.prefix_L2PGK = self.cache.prefix_L2PGK
        self.feed_prompts(list(range(len(paths))), paths, self.prefix_outside, cache)
        return super().load_paths(row, parents)


def switch_off(module, name: str, value) -> Callable[[Callable], Callable]:
    """Makes a side run with a name of a module set to a value."""

    def without(side: Callable) -> Callable:
        def run(*configs) -> dict:
            setattr(module, name, value)
            return side(*configs)

        return run

    return without


def in_float32(side: Callable) -> Callable:
    """Makes a side compute in float32."""
    return lambda source, *configs: side(replace(source, dtype="float32"), *configs)


LADDER = {  # what is switched off, and how
    "no bfloat16": in_float32,
    "no tree cache": switch_off(sys.modules[__name__], "Engine", NoTreeCache),
    # the prompt's common part is fed once, but read by each row
    "no common read": switch_off(engine, "SHORT_PREFIX", sys.maxsize),
    "no common part": switch_off(engine, "common_prefix", lambda prompts: []),
    "one big draw": switch_off(data, "IN_CACHE", sys.maxsize),
    "memory freed": switch_off(ranks, "keep_freed_memory", lambda: None),
}
SIDES = {
    "ours": search_ours,
    "peer": search_peer,
    "sample-ours": sample_ours,
    "sample-peer": sample_peer,
    "vllm": partial(search_peer, kind=VllmPeer),
    "sample-vllm": partial(sample_peer, kind=VllmPeer),
    "train-ours": train_ours,
    "trl": train_trl,
    "trl-precomputed": partial(train_trl, precompute=True),
}
for rung, without in LADDER.items():
    SIDES[rung] = without(search_ours)
    SIDES[f"sample-{rung}"] = without(sample_ours)
