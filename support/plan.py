"""What a run will take: the memory of each phase on 1 to 64 GPUs, and a floor of the time.

It is computed from the model's shape alone. The formulas are our own; tests/test_plan.py compares
activations, cache and optimizer state with what PyTorch stores.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from support.ranks import rank

GPUS = (1, 2, 4, 8, 64)
SPARE = 0.06  # of a GPU's memory: the CUDA context and what the allocator cannot use
BANDWIDTH = 3.35e12  # of an H100, in bytes a second
RATE = {"bfloat16": 989e12, "float32": 67e12}  # of an H100, in FLOPs a second
REACHED = 0.5  # the part of both that a program reaches
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
HEADER = (
    f"{'':>5} {'loading':>8} | {'search, GB a GPU':<51} | training, GB a GPU\n"
    f"{'GPUs':>5} {'GB':>8} | {'weights':>7} {'cache':>6} {'other':>6} {'all':>6} "
    f"{'cache tokens at most':>22} | {'state':>6} {'gathered':>9} {'activations':>12} {'all':>6}"
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model: its configuration, numbers of parameters, and bytes of a number."""

    config: object  # a model.LlamaConfig
    parameters: int
    block_parameters: int
    width: int  # bytes of a number
    logits: int  # how many logits a training step computes at once

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.width

    def cached_token(self) -> int:
        """Bytes of the keys and values of a token."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.width

    def layer_activations(self) -> int:
        """Bytes that a block keeps of a token for its backward pass.

        Norms: input, normalised and scaled, twice. Attention: queries, keys, values, its result,
        and the result in the order of o_proj. MLP: gate, its SiLU, up, and their product. Fused
        kernels keep less.
        """
        c = self.config
        heads = c.num_attention_heads * c.head_dim
        groups = c.num_key_value_heads * c.head_dim
        return (6 * c.hidden_size + 3 * heads + 2 * groups + 4 * c.intermediate_size) * self.width

    def activations(self, tokens: int, recompute: bool) -> int:
        """Bytes kept for the backward pass of `tokens` tokens, with the logits of a chunk."""
        layers = self.config.num_hidden_layers
        kept = layers * self.layer_activations()
        if recompute:
            kept = layers * self.config.hidden_size * self.width + self.layer_activations()
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
    """Questions of 256 tokens, prompts of three bytes a token, steps of half the longest length."""
    prompt = 256 + (Path(run.prompt).stat().st_size // 3 if run.prompt else 0)
    plain = 256 + Path(run.train_prompt).stat().st_size // 3 if run.train_prompt else prompt
    sampled = search.simulations * search.expand_width * search.max_step_tokens // 2
    return Lengths(prompt, plain, sampled)


def search_memory(sizes: Sizes, lengths: Lengths, search, answering) -> tuple[int, int, int]:
    """Bytes of weights, of the cache, and of logits and activations while a model searches."""
    c = sizes.config
    lanes = max(search.search_rows * search.expand_width, answering.answer_lanes)
    logits = lanes * c.vocab_size * (sizes.width + 16)
    hidden = (2 * c.intermediate_size + 4 * c.hidden_size) * sizes.width
    working = logits + search.search_rows * lengths.search_prompt * hidden
    return sizes.weights, search.cache_tokens * sizes.cached_token(), working


def training_memory(sizes: Sizes, lengths: Lengths, gpus: int, run, train) -> dict[str, float]:
    """Bytes of each part of loading and training on one of `gpus` GPUs."""
    unsharded = gpus == 1 and run.dtype == "float32"
    block = sizes.block_parameters
    root = sizes.parameters - block * sizes.config.num_hidden_layers
    gathered = (2 * root + 3 * block) * sizes.width + 4 * max(root, block)
    tokens = train.pack_tokens or math.ceil(train.tune_batch / gpus) * lengths.training_tree
    tokens = max(tokens, lengths.training_tree)
    shards = 0 if unsharded else 1 / gpus  # made while the whole model is in memory in float32
    return {
        "loading": 4 * sizes.parameters * (1 + shards),
        "state": 16 * sizes.parameters / gpus,  # float32 weights, gradients and AdamW's moments
        "gathered": 0 if unsharded else gathered,
        "activations": sizes.activations(tokens, train.recompute),
    }


def print_plan(sizes: Sizes, run, train, search, losses, answering):
    """Print the plan of a run, given the dataclasses of train.py's flags; only rank 0 does."""
    if rank():
        return
    capacity = 80e9
    if torch.cuda.is_available():
        capacity = torch.cuda.get_device_properties(0).total_memory
    usable = capacity * (1 - SPARE)
    lengths = assumed_lengths(run, search)
    print_assumptions(sizes, lengths, capacity, run, search)
    weights, cache, working = search_memory(sizes, lengths, search, answering)
    searching = weights + cache + working
    room = int(max(0, usable - weights - working) // sizes.cached_token())
    print(HEADER)
    problems = {}
    for gpus in GPUS:
        parts = training_memory(sizes, lengths, gpus, run, train)
        if losses.objective == "grpo":  # an unsharded copy samples between the steps
            parts["activations"] += searching
        training = parts["state"] + parts["gathered"] + parts["activations"]
        phases = {"loading": parts["loading"], "search": searching, "training": training}
        loading, *search_cells = gigabytes(parts["loading"], weights, cache, working, searching)
        print(
            f"{gpus:>5} {loading:>8} | {columns(search_cells, (7, 6, 6, 6))} {room:>22,} | "
            + columns(gigabytes(*list(parts.values())[1:], training), (6, 9, 12, 6))
        )
        over = [f"{n} ({size / 1e9:.1f} GB)" for n, size in phases.items() if size > usable]
        if over:
            problems[gpus] = f"{gpus} GPU{'s' * (gpus > 1)}: {' and '.join(over)} will not fit"
            if parts["activations"] > capacity / 4:
                problems[gpus] += "; activations are large: --recompute, or fewer --pack-tokens"
    print_verdict(sizes, problems)
    print_floor(sizes, lengths, weights, run, train, search)


def gigabytes(*sizes: float) -> list[str]:
    return [f"{size / 1e9:.1f}" for size in sizes]


def columns(cells: list[str], widths: tuple) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def print_assumptions(sizes: Sizes, lengths: Lengths, capacity: float, run, search):
    """What is planned for, and whether a tree fits in its share of the cache."""
    row = search.cache_tokens // search.search_rows
    beside = (search.max_depth + search.expand_width) * search.max_step_tokens
    tree = row - lengths.search_prompt - beside
    early = " and may end early" if tree < lengths.sampled else ""
    print(
        f"{run.model}: {sizes.parameters / 1e9:.2f} B parameters, computing in {run.dtype}; "
        f"{capacity / 1e9:.0f} GB a GPU, {100 * SPARE:.0f} % of it kept free\n"
        f"Assumed: prompts of {lengths.search_prompt} tokens in search and "
        f"{lengths.training_prompt} in training; trees of {lengths.sampled} sampled tokens (steps "
        "half as long as --max-step-tokens), packed without padding\n"
        f"--cache-tokens {search.cache_tokens} of {sizes.cached_token() / 1e6:.3f} MB each: with "
        f"--search-rows {search.search_rows} a question's tree has room for {tree}{early}\n"
    )


def print_verdict(sizes: Sizes, problems: dict[int, str]):
    """On which numbers of GPUs the run fits, and what does not fit on the others."""
    print("\n" + ("\n".join(problems.values()) or "All phases fit on every number of GPUs above."))
    fitting = ", ".join(str(gpus) for gpus in GPUS if gpus not in problems) or "none"
    print(
        f"It fits on {fitting} of these. Host memory: each rank reads the whole file, "
        f"{4 * sizes.parameters / 1e9:.0f} GB in float32; rank 0 gathers as much to save"
    )


def print_floor(sizes: Sizes, lengths: Lengths, weights: int, run, train, search):
    """The least time of search, a tick of which reads weights and cache, and of training."""
    beside = (search.max_depth + search.expand_width) * search.max_step_tokens
    slots = search.search_rows * (lengths.search_prompt + beside)  # that a tick reads at most
    tick = (weights + slots * sizes.cached_token()) / (BANDWIDTH * REACHED)
    lanes = search.search_rows * search.expand_width
    searching = 1000 * lengths.sampled / (lanes / tick)
    each = (8 if train.recompute else 6) * sizes.parameters
    flops = each * lengths.training_tree * train.tune_epochs * 1000
    training = flops / (RATE[run.dtype] * REACHED)
    print(
        f"\nFloor of the time at {100 * REACHED:.0f} % of an H100's bandwidth and matrix rate, for "
        f"1,000 questions on one GPU (divide by their number): search {searching / 3600:.1f} h "
        f"({1000 * tick:.0f} ms a tick of {lanes} tokens), {train.tune_epochs} passes over their "
        f"trees {training / 3600:.1f} h"
    )
