"""What a run will take: the memory of each phase on 1 to 64 GPUs, and a floor of the time.

It is computed from the model's shape alone. The formulas are our own; tests/test_plan.py compares
activations, cache and optimizer state with what PyTorch stores.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from support.memory import KEPT_FREE, cached_token, rows_that_fit, search_bytes
from support.ranks import rank

GPUS = (1, 2, 4, 8, 64)
BANDWIDTH = 3.35e12  # of an H100, in bytes a second
RATE = {"bfloat16": 989e12, "float32": 67e12}  # of an H100, in FLOPs a second
REACHED = 0.5  # the part of both that a program reaches
# of the lanes of a search, 15 of 32 with SmolLM2-135M on GSM8K: the others wait for the longest
LIVE = 0.47
QUESTIONS = 15000  # GSM8K and MATH
TREE_BYTES = 17  # of the host's memory for a token of a tree: two list entries, and its node
JSON_BYTES = 14  # of a token on the disk
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
HEADER = (
    f"{'':>5} {'loading':>8} | training, GB a GPU\n"
    f"{'GPUs':>5} {'GB':>8} | {'state':>6} {'gathered':>9} {'activations':>12} {'all':>6}"
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model: its configuration, numbers of parameters, and bytes of a number."""

    config: object  # a model.LlamaConfig
    parameters: int
    block_parameters: int
    trained: int  # parameters: all, or with LoRA the adapters and the value head
    width: int  # bytes of a number
    logits: int  # how many logits a training step computes at once

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.width

    @property
    def lora(self) -> bool:
        return self.trained != self.parameters

    @property
    def training_weights(self) -> int:
        """Bytes of the weights that are trained, in float32, and of those that are frozen."""
        return 4 * self.trained + (self.weights if self.lora else 0)

    @property
    def training_state(self) -> int:
        """Bytes of these, of gradients and of AdamW's moments."""
        return self.training_weights + 12 * self.trained

    @property
    def loaded(self) -> int:
        """Bytes of the weights as they are loaded for training, and read by rank 0 to be saved."""
        return self.weights if self.lora else 4 * self.parameters

    def cached_token(self) -> int:
        """Bytes of the keys and values of a token."""
        return cached_token(self.config, self.width)

    def layer_activations(self) -> int:
        """Bytes that a block keeps of a token for its backward pass.

        Norms: input, normalised and scaled, twice. Attention: queries, keys, values, its result,
        and the result in the order of o_proj. MLP: gate, its SiLU, up, and their product. Fused
        kernels keep less. On a CPU the keys and values may be kept model.GATHERED times: that is
        not counted, trees of GSM8K come to 1.7.
        """
        c = self.config
        heads = c.num_attention_heads * c.head_dim
        groups = c.num_key_value_heads * c.head_dim
        return (6 * c.hidden_size + 3 * heads + 2 * groups + 4 * c.intermediate_size) * self.width

    def activations(self, tokens: int, recompute: bool) -> int:
        """Bytes kept for the backward pass of `tokens` tokens, with the logits of a chunk.

        Behind the blocks stand the hidden states that both heads read, and their gradient.
        """
        layers = self.config.num_hidden_layers
        hidden = self.config.hidden_size * self.width
        kept = 2 * hidden + layers * self.layer_activations()
        if recompute:
            kept = (layers + 2) * hidden + self.layer_activations()
        return tokens * kept + 3 * 4 * self.logits


@dataclass(frozen=True)
class Lengths:
    """Assumed lengths in tokens."""

    search_prompt: int
    training_prompt: int
    sampled: int  # of a question's tree, without its prompt

    @property
    def training_tree(self) -> int:
        """Prompt and tree, under the prompt of training."""
        return self.training_prompt + self.sampled


def assumed_lengths(run, search) -> Lengths:
    """Questions of 256 tokens, prompts of three bytes a token, trees as large as they may be."""
    prompt = 256 + (Path(run.prompt).stat().st_size // 3 if run.prompt else 0)
    plain = 256 + Path(run.train_prompt).stat().st_size // 3 if run.train_prompt else prompt
    whole = search.simulations * search.expand_width * search.max_step_tokens
    return Lengths(prompt, plain, min(whole, search.tree_tokens - prompt))


@dataclass(frozen=True)
class Searching:
    """A search or a strategy: what one question takes, and how many are wanted at once."""

    name: str
    tokens: int  # of the cache
    lanes: int
    most: int  # questions at once

    def rows(self, sizes: "Sizes", free: float, cache_tokens: int) -> int:
        """How many questions fit at once into `free` bytes, or into --cache-tokens."""
        return rows_that_fit(self.most, self.tokens, self.bytes(sizes), free, cache_tokens)

    def bytes(self, sizes: "Sizes") -> int:
        """Bytes of one question."""
        return search_bytes(sizes.config, sizes.width, self.tokens, self.lanes)


def training_memory(sizes: Sizes, lengths: Lengths, gpus: int, run, train) -> dict[str, float]:
    """Bytes of each part of loading and training on one of `gpus` GPUs."""
    block = sizes.block_parameters
    root = sizes.parameters - block * sizes.config.num_hidden_layers
    if gpus > 1:
        gathered = (2 * root + 3 * block) * sizes.width + 4 * max(root, block)
    else:  # a copy to compute with
        gathered = 0 if run.dtype == "float32" or sizes.lora else sizes.weights
    share = math.ceil(train.tune_batch / gpus) * lengths.training_tree
    tokens = max(min(train.pack_tokens or share, share), lengths.training_tree)
    shards = 1 / gpus if gpus > 1 else 0  # made while the whole model is in memory
    return {
        "loading": sizes.loaded * (1 + shards),
        "state": sizes.training_state / gpus,
        "gathered": gathered,
        "activations": sizes.activations(tokens, train.recompute),
    }


def pack_room(sizes: Sizes, gpus: int, run, train, free: float) -> int:
    """Tokens of a forward and backward pass for which `free` bytes suffice; under 1: none.

    Gradients and AdamW's moments of the weights that are there already are still to come.
    """
    parts = training_memory(sizes, Lengths(0, 0, 1), gpus, run, replace(train, pack_tokens=1))
    fixed = 12 * sizes.trained / gpus + parts["gathered"] + sizes.activations(0, train.recompute)
    each = sizes.activations(1, train.recompute) - sizes.activations(0, train.recompute)
    return int((free - fixed) // each)


def print_plan(sizes: Sizes, searches: list[Searching], run, train, search, groups: bool):
    """Print the plan of a run, given the dataclasses of train.py's flags; only rank 0 does."""
    if rank():
        return
    capacity = 1e9 * run.plan_memory or 80e9
    if torch.cuda.is_available() and not run.plan_memory:
        capacity = torch.cuda.get_device_properties(0).total_memory
    usable = capacity * (1 - KEPT_FREE)
    lengths = assumed_lengths(run, search)
    print_assumptions(sizes, lengths, capacity, run)
    searching = print_searches(sizes, searches, usable, search)
    print(HEADER)
    problems = {}
    for gpus in GPUS:
        parts = training_memory(sizes, lengths, gpus, run, train)
        if not train.pack_tokens:  # as much as fits, one tree at least
            left = usable - sizes.training_weights / gpus
            room = max(1, pack_room(sizes, gpus, run, train, left))
            parts = training_memory(sizes, lengths, gpus, run, replace(train, pack_tokens=room))
        if groups:  # an unsharded copy samples between the steps
            parts["activations"] += sizes.weights
        training = parts["state"] + parts["gathered"] + parts["activations"]
        phases = {"loading": parts["loading"], "search": searching, "training": training}
        loading = gigabytes(parts["loading"])[0]
        cells = gigabytes(*list(parts.values())[1:], training)
        print(f"{gpus:>5} {loading:>8} | {columns(cells, (6, 9, 12, 6))}")
        over = [f"{n} ({size / 1e9:.1f} GB)" for n, size in phases.items() if size > usable]
        if over:
            problems[gpus] = f"{gpus} GPU{'s' * (gpus > 1)}: {' and '.join(over)} will not fit"
            if training > usable and parts["activations"] > capacity / 4:
                problems[gpus] += "; activations are large: --recompute, or fewer --pack-tokens"
    print_verdict(sizes, lengths, problems, run, train)
    print_floor(sizes, lengths, searches[0], usable, run, train, search)


def print_searches(sizes: Sizes, searches: list[Searching], usable: float, search) -> float:
    """Print what each kind of search takes of a GPU, with a whole copy of the weights.

    Returns the most that one of them takes.
    """
    print(f"{'':12} {'questions':>10} {'lanes':>6} {'GB each':>8} {'GB in all':>10}  (a GPU)")
    most = 0
    for one in searches:
        rows = one.rows(sizes, usable - sizes.weights, search.cache_tokens)
        size = sizes.weights + max(1, rows) * one.bytes(sizes)
        each, whole = gigabytes(one.bytes(sizes), size)
        print(f"{one.name:12} {rows:>10} {rows * one.lanes:>6} {each:>8} {whole:>10}")
        most = max(most, size)
    print()
    return most


def gigabytes(*sizes: float) -> list[str]:
    return [f"{size / 1e9:.1f}" for size in sizes]


def columns(cells: list[str], widths: tuple) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def print_assumptions(sizes: Sizes, lengths: Lengths, capacity: float, run):
    """What is planned for."""
    print(
        f"{run.model}: {sizes.parameters / 1e9:.2f} B parameters, computing in {run.dtype}; "
        f"{capacity / 1e9:.0f} GB a GPU, {100 * KEPT_FREE:.0f} % of it kept free\n"
        f"Assumed: prompts of {lengths.search_prompt} tokens in search and "
        f"{lengths.training_prompt} in training; trees of {lengths.sampled} sampled tokens, packed "
        f"without padding; {sizes.cached_token() / 1e6:.3f} MB for each cached token\n"
    )


def print_verdict(sizes: Sizes, lengths: Lengths, problems: dict[int, str], run, train):
    """On which numbers of GPUs the run fits, what does not fit on the others; host and disk."""
    print("\n" + ("\n".join(problems.values()) or "All phases fit on every number of GPUs above."))
    fitting = ", ".join(str(gpus) for gpus in GPUS if gpus not in problems) or "none"
    trees = QUESTIONS * lengths.training_tree
    model = 4 * sizes.parameters
    kept = (train.keep + 1) * 12 * sizes.trained
    disk = (run.rounds + 1) * model + kept + run.rounds * trees * JSON_BYTES
    if 1 in problems and not sizes.lora:
        print("With --lora-rank 16 training takes less: see the plan with it.")
    print(
        f"It fits on {fitting} of these. Host memory of each rank: {model / 1e9:.0f} GB while the "
        f"weights are read and when rank 0 saves, and {trees * TREE_BYTES / 1e9:.0f} GB for the "
        f"trees of {QUESTIONS:,} questions. Disk: {disk / 1e9:.0f} GB for {run.rounds + 1} models, "
        f"{train.keep + 1} checkpoints and the trees"
    )


def print_floor(sizes: Sizes, lengths: Lengths, one: Searching, usable, run, train, search):
    """The least time of search, a tick of which reads weights and cache, and of training."""
    rows = max(1, one.rows(sizes, usable - sizes.weights, search.cache_tokens))
    slots = rows * (lengths.search_prompt + lengths.sampled // 8)  # that a tick reads
    tick = (sizes.weights + slots * sizes.cached_token()) / (BANDWIDTH * REACHED)
    live = LIVE * rows * one.lanes
    searching = 1000 * lengths.sampled / (live / tick)
    each = (8 if train.recompute else 6) * sizes.parameters
    flops = each * lengths.training_tree * train.tune_epochs * 1000
    training = flops / (RATE[run.dtype] * REACHED)
    print(
        f"\nFloor of the time at {100 * REACHED:.0f} % of an H100's bandwidth and matrix rate, for "
        f"1,000 questions on one GPU (divide by their number): search {searching / 3600:.1f} h "
        f"({1000 * tick:.0f} ms a tick of {live:.0f} live lanes), {train.tune_epochs} passes over "
        f"their trees {training / 3600:.1f} h"
    )
