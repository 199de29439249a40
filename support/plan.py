"""What a run will take: memory of each phase on 1 to 64 GPUs, and a floor of the time, from the model's shape alone.

Formulas of our own; `tests/test_plan.py` holds activations, cache and optimizer state against what PyTorch stores.
"""
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data import PRESETS, find_folder
from model import Llama, LlamaConfig, read_config
from svpo import LOGITS

GPUS = (1, 2, 4, 8, 64)
SPARE = 0.06  # of a GPU's memory: the CUDA context and what the allocator cannot use
BANDWIDTH, RATE = 3.35e12, {"bfloat16": 989e12, "float32": 67e12}  # an H100's: bytes a second, FLOPs a second
SHARE = 0.5  # of these, reached


def shape_of(model: str) -> LlamaConfig:
    """The configuration of a preset, folder or repository, of which only config.json is read."""
    if model in PRESETS and not Path(model).is_dir():
        return LlamaConfig(**PRESETS[model][1])
    return read_config(find_folder(model, ("config.json",)))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that computes in numbers of `width` bytes."""
    config: LlamaConfig
    width: int

    def count(self) -> tuple[int, int, int]:
        """Parameters: all, those of a block, those outside the blocks."""
        with torch.device("meta"):
            model = Llama(self.config)
        total, block = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.model.layers[0]))
        return total, block, total - block * self.config.num_hidden_layers

    def cached_token(self) -> int:
        """Bytes of a token's keys and values."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.width

    def layer_activations(self) -> int:
        """Bytes that a block keeps of a token for its backward pass. Norms: input, normalised and scaled, twice. Attention: queries,
        keys, values, its result, and that in the order of o_proj. MLP: gate, its SiLU, up, and their product. Fused kernels
        keep less."""
        c = self.config
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return (6 * c.hidden_size + 3 * heads + 2 * groups + 4 * c.intermediate_size) * self.width

    def activations(self, tokens: int, recompute: bool) -> int:
        """Bytes kept for the backward pass of a forward pass of so many tokens, with a chunk of logits and its gradient."""
        layers, one = self.config.num_hidden_layers, self.layer_activations()
        kept = layers * self.config.hidden_size * self.width + one if recompute else layers * one
        return tokens * kept + 3 * 4 * LOGITS


def print_plan(config: LlamaConfig, run, train, search, losses, answering):
    """Print the plan of a run (the stages of train.py); rank 0 does."""
    if int(os.environ.get("RANK", 0)):
        return
    width = {"float32": 4, "bfloat16": 2}[run.dtype]
    capacity = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80e9
    sizes = Sizes(config, width)
    total, block, root = sizes.count()
    prompt = 256 + (Path(run.prompt).stat().st_size // 3 if run.prompt else 0)
    plain = 256 + (Path(run.train_prompt).stat().st_size // 3 if run.train_prompt else prompt - 256)
    tree = search.cache_tokens // search.search_rows - prompt - (search.max_depth + search.expand_width) * search.max_step_tokens
    sampled = search.simulations * search.expand_width * search.max_step_tokens // 2
    print(f"{run.model}: {total / 1e9:.2f} B parameters, computing in {run.dtype}; {capacity / 1e9:.0f} GB a GPU, {100 * SPARE:.0f} % of it kept "
          f"free\nAssumed: prompts of {prompt} tokens in search and {plain} in training; trees of {sampled} sampled tokens (steps half as long "
          f"as --max-step-tokens), packed without padding\n--cache-tokens {search.cache_tokens} of {sizes.cached_token() / 1e6:.3f} MB each: with --search-rows "
          f"{search.search_rows} a question's tree has room for {tree}" + (" and may end early\n" if tree < sampled else "\n"))
    lanes = max(search.search_rows * search.expand_width, answering.answer_lanes)
    working = lanes * config.vocab_size * (width + 16) + search.search_rows * prompt * (2 * config.intermediate_size + 4 * config.hidden_size) * width
    weights, cache = total * width, search.cache_tokens * sizes.cached_token()
    room = int(max(0, capacity * (1 - SPARE) - weights - working) // sizes.cached_token())
    print(f"{'':>5} {'loading':>8} | {'search, GB a GPU':<51} | training, GB a GPU\n{'GPUs':>5} {'GB':>8} | {'weights':>7} {'cache':>6} {'other':>6} "
          f"{'all':>6} {'cache tokens at most':>22} | {'state':>6} {'gathered':>9} {'activations':>12} {'all':>6}")
    problems = []
    for count in GPUS:
        whole = count == 1 and run.dtype == "float32"  # nothing is sharded
        state = 16 * total / count  # float32 weights, gradients, and AdamW's two moments
        gathered = 0 if whole else (2 * root + 3 * block) * width + 4 * max(root, block)
        tokens = max(train.pack_tokens or math.ceil(train.tune_batch / count) * (plain + sampled), plain + sampled)
        kept = sizes.activations(tokens, train.recompute)
        loading = 4 * total * (1 + (0 if whole else 1 / count))  # whole in float32, then its shards beside it
        if losses.objective == "grpo":  # a whole copy samples between the steps
            kept += weights + cache + working
        phases = {"loading": loading, "search": weights + cache + working, "training": state + gathered + kept}
        figures = [f"{value / 1e9:.1f}" for value in (loading, weights, cache, working, phases["search"], state, gathered, kept, phases["training"])]
        print(f"{count:>5} {figures[0]:>8} | {figures[1]:>7} {figures[2]:>6} {figures[3]:>6} {figures[4]:>6} {room:>22,} | "
              f"{figures[5]:>6} {figures[6]:>9} {figures[7]:>12} {figures[8]:>6}")
        over = [f"{name} ({size / 1e9:.1f} GB)" for name, size in phases.items() if size > capacity * (1 - SPARE)]
        problems += [f"{count} GPU{'s' * (count > 1)}: {' and '.join(over)} will not fit"] if over else []
        if kept > capacity / 4 and over:
            problems[-1] += "; activations are large: --recompute, or fewer --pack-tokens"
    print("\n" + ("\n".join(problems) or "All phases fit on every number of GPUs above."))
    fitting = [count for count in GPUS if not any(line.startswith(f"{count} GPU") for line in problems)]
    print(f"It fits on {', '.join(map(str, fitting)) or 'none'} of these. Host memory: each rank reads the whole file, {4 * total / 1e9:.0f} GB in float32; "
          "rank 0 gathers as much to save")
    slots = prompt + (search.max_depth + search.expand_width) * search.max_step_tokens  # that a tick reads at most, of each row
    print_floor(run, train, search, weights + search.search_rows * slots * sizes.cached_token(), total, plain + sampled, sampled)


def print_floor(run, train, search, read: float, total: int, tokens: int, sampled: int):
    """Print the least time of search, a tick of which reads `read` bytes, and of training on trees of `tokens` tokens."""
    tick = read / (BANDWIDTH * SHARE)
    searching = 1000 * sampled / (search.search_rows * search.expand_width / tick)
    flops = (8 if train.recompute else 6) * total * tokens * train.tune_epochs * 1000
    print(f"\nFloor of the time at {100 * SHARE:.0f} % of an H100's bandwidth and matrix rate, for 1,000 questions on one GPU (divide by "
          f"their number): search {searching / 3600:.1f} h ({1000 * tick:.0f} ms a tick of {search.search_rows * search.expand_width} tokens), "
          f"{train.tune_epochs} passes over their trees {flops / (RATE[run.dtype] * SHARE) / 3600:.1f} h")
