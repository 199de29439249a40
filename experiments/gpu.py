"""What one GPU allows, and how much of it is reached: decoding, training, peak memory and search.

    python experiments/bench.py gpu         on a GPU; --tiny takes small shapes on any device

The weights are random, no network is needed, and it takes under 8 minutes. The floors are:

- Decoding: a tick must read the weights and the cached keys and values once, at the bandwidth that
  a plain copy reaches.
- Training: a step must do 6 FLOPs for each weight and unique token, and 12 for each layer, width
  and pair of tokens that see each other, at the rate that a large matrix product reaches.

Dimension key: X tokens of one flat line (one for each sequence that is decoded), W all lanes,
B rows, N lanes of a row, S slots, L layers, G key/value heads, K head width, D width.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch

from data import StepTokenizer, Tree, TreeNode
from engine import Tick, TreeCache
from experiments.bench import last_line
from model import Llama, LlamaConfig, save_model
from support.flags import run_command
from support.graphs import Graphed
from svpo import Lesson, LossConfig, learn
from tasks.built_in import task_tokenizer
from train import TrainConfig, backward, shard

SHAPES = {
    "7B": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 8192),
    "1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, tie_word_embeddings=True),
    "tiny": LlamaConfig(64, 64, 128, 2, 4, 2, 16, 2048),
}
LANES = 4  # siblings decoded together in a row
KERNELS = {  # kind -> parts of the names of its kernels; what has none of them is "other kernels"
    "matrix products": ("gemm", "cutlass", "nvjet", "matmul", "gemv", "splitk"),
    "attention": ("fmha", "flash", "attention", "softmax", "flex"),
}
PARTS = ("decoding", "training", "search")


def clock(action, device: str, repeats: int = 10) -> float:
    """Median seconds of `repeats` runs, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def roofs(device: str, dtype: torch.dtype, tiny: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), FLOPs a second of a large matrix product."""
    count = 2**20 if tiny else 2**30
    source = torch.empty(count, dtype=dtype, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / clock(lambda: target.copy_(source), device)
    size = 256 if tiny else 8192
    one, two = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return bandwidth, 2 * size**3 / clock(lambda: one @ two, device)


def random_model(shape: LlamaConfig, device: str, dtype: torch.dtype) -> Llama:
    """A model with weights so small that nothing overflows."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Llama(shape)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    return model.eval()


def kernels(action) -> dict[str, float]:
    """Seconds of CUDA kernels by kind, of one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        action()
        torch.cuda.synchronize()
    found = dict.fromkeys((*KERNELS, "other kernels"), 0.0)
    for event in watched.key_averages():
        found[kernel_kind(event.key.lower())] += event.self_device_time_total / 1e6
    return found


def kernel_kind(name: str) -> str:
    """What a kernel of this name does."""
    for kind, marks in KERNELS.items():
        if any(mark in name for mark in marks):
            return kind
    return "other kernels"


# ---------------------------------------------------------------------------------------- decoding


@torch.inference_mode()
def time_tick(model: Llama, device: str, dtype: torch.dtype, live: int, cached: int) -> dict:
    """One tick (engine.Tick, replayed as the engine does) of `live` sequences.

    Each row decodes LANES siblings, and reads `cached` tokens. Returns seconds, the bytes of
    weights and of keys and values that a tick reads, and seconds of kernels by kind (on CUDA).
    """
    shape = model.config
    lanes = min(LANES, live)
    rows = live // lanes
    cache = TreeCache(shape, rows, cached + 1, 0, device, dtype)
    cache.slots_L2BSGK.normal_(0, 0.1)
    tokenizer = SimpleNamespace(tables_4V=torch.zeros(4, shape.vocab_size))
    tokenizer.draw = partial(StepTokenizer.draw, tokenizer)
    tick = Tick(model, tokenizer, cache, lanes, temperature=1.0)
    tick.hidden_WD.normal_()
    replayed = Graphed(tick, tick.hidden_WD)
    inputs = tick_inputs(rows, lanes, cached, device)
    seconds = clock(lambda: replayed(*inputs).cpu(), device)
    width = torch.finfo(dtype).bits // 8  # bytes of a number
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not shape.tie_word_embeddings:  # then a tick reads a few lines of the embedding only
        weights -= model.model.embed_tokens.weight.numel()
    found = kernels(lambda: replayed(*inputs)) if device == "cuda" else {}
    return {
        "seconds": seconds,
        "weights": width * weights,
        "keys": width * rows * cached * cached_numbers(shape),
        "kernels": found,
    }


def tick_inputs(rows: int, lanes: int, cached: int, device: str) -> tuple:
    """The inputs of a tick in which each lane sees all but its siblings' newest tokens."""
    live = rows * lanes
    lane_X = torch.arange(live, device=device)
    slot_X = cached - lanes + lane_X % lanes
    mask_B1NS = torch.zeros(rows, 1, lanes, cached, dtype=torch.bool, device=device)
    mask_B1NS[..., : cached - lanes] = True
    mask_B1NS.view(live, cached)[lane_X, slot_X] = True
    uniform_X = torch.rand(live, device=device)
    given_X = torch.full((live,), -1, device=device)
    position_X = torch.full((live,), cached, device=device)
    return lane_X, uniform_X, given_X, slot_X, position_X, mask_B1NS


def cached_numbers(shape: LlamaConfig) -> int:
    """How many numbers the cache holds for a token."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim


def fits(shape: LlamaConfig, live: int, cached: int, device: str) -> bool:
    """Whether the device has room for the cache of so many sequences, in bfloat16."""
    if device != "cuda":
        return True
    cache = 2 * cached_numbers(shape) * max(1, live // LANES) * cached  # bytes
    return 2.2 * cache <= torch.cuda.mem_get_info()[0]  # a copy, and a little more


def print_decoding(
    names: list[str], device: str, dtype: torch.dtype, bandwidth: float, tiny: bool
) -> list[dict]:
    """Time ticks of these models at several sizes, and print a line for each."""
    live_sizes = (1, 8) if tiny else (1, 8, 64, 128, 256, 512)
    cached_sizes = (64, 128) if tiny else (512, 1024, 2048, 4096)
    print(
        f"\n{'decoding':10}{'live':>6}{'cached':>8}{'GB read':>9}{'floor ms':>10}{'tick ms':>9}"
        f"{'of bandwidth':>14}{'tokens/s':>10}   largest loss"
    )
    rows = []
    for name in names:
        model = random_model(SHAPES[name], device, dtype)
        for live, cached in itertools.product(live_sizes, cached_sizes):
            if not fits(model.config, live, cached, device):
                continue
            found = time_tick(model, device, dtype, live, cached)
            floor = (found["weights"] + found["keys"]) / bandwidth
            row = {"shape": name, "live": live, "cached": cached, "floor": floor, **found}
            rows.append(row)
            print_tick(row, bandwidth)
        del model
    return rows


def print_tick(row: dict, bandwidth: float):
    """One line of the table of decoding."""
    print(
        f"{row['shape']:10}{row['live']:6}{row['cached']:8}"
        f"{(row['weights'] + row['keys']) / 1e9:9.2f}{1e3 * row['floor']:10.3f}"
        f"{1e3 * row['seconds']:9.3f}{100 * row['floor'] / row['seconds']:13.1f}%"
        f"{row['live'] / row['seconds']:10.0f}   {largest_loss(row, bandwidth)}",
        flush=True,
    )


def largest_loss(row: dict, bandwidth: float) -> str:
    """Where a tick loses most against its floor; "-" where kernels are not timed."""
    spent = row["kernels"]
    if not spent:
        return "-"
    losses = {
        "matrix products": spent["matrix products"] - row["weights"] / bandwidth,
        "attention": spent["attention"] - row["keys"] / bandwidth,
        "other kernels": spent["other kernels"],
        "between kernels": row["seconds"] - sum(spent.values()),
    }
    worst = max(losses, key=losses.get)
    return f"{worst} {1e3 * losses[worst]:.3f} ms"


# ---------------------------------------------------------------------------------------- training


def random_tree(rng: random.Random, vocabulary: int, tiny: bool) -> Tree:
    """A tree as search leaves it: 16 expansions of 4 children, steps of about 40 tokens, a prompt
    of 200."""
    prompt, step, expansions = (20, 5, 12) if tiny else (200, 40, 16)

    def words(count):
        return [rng.randrange(vocabulary) for _ in range(count)]

    nodes = [TreeNode(-1, words(prompt), [False] * prompt)]
    depth = [0]
    for _ in range(expansions):
        parents = {node.parent for node in nodes}
        leaves = [n for n in range(len(nodes)) if depth[n] < 5 and n not in parents]
        leaf = rng.choice(leaves)
        for _ in range(4):
            count = rng.randint(step // 2, 3 * step // 2)
            reward = rng.choice((-1.0, 1.0)) if depth[leaf] == 4 else None
            node = TreeNode(leaf, words(count), [True] * count, -float(count), 0.4, 1)
            node.q_value = reward or rng.uniform(-1, 1)
            node.reward = reward
            node.ending = "answer" if reward else None
            nodes.append(node)
            depth.append(depth[leaf] + 1)
    return Tree(str(rng.random()), "", "", nodes, expansions)


def branches(lesson: Lesson) -> list[Lesson]:
    """What pairwise training feeds: both sides of every pair, each as a tree of one branch."""
    nodes = lesson.tree.nodes
    found = []
    for win, lose, _ in lesson.pairs:
        for end in (win, lose):
            line = []
            for index in (0, *lesson.tree.path(end)):
                reward = 1.0 if index == end else None
                line.append(replace(nodes[index], parent=len(line) - 1, reward=reward))
            found.append(learn(Tree("", "", "", line), LossConfig("rft")))
    return found


def attended(tree: Tree) -> int:
    """Pairs of tokens that see each other. A token's own step counts whole: a little too many."""
    sizes = [len(node.tokens) for node in tree.nodes]
    pairs = 0
    for index, size in enumerate(sizes):
        pairs += size * sum(sizes[above] for above in (0, *tree.path(index)))
    return pairs


def training_flops(model: Llama, tokens: int, pairs: int) -> float:
    """The least FLOPs of a step on `tokens` unique tokens, with `pairs` pairs of tokens that see
    each other."""
    shape = model.config
    weights = shape.vocab_size * shape.hidden_size
    for name, parameter in model.named_parameters():
        weights += parameter.numel() if "layers" in name else 0
    width = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return 6 * weights * tokens + 12 * width * pairs / 2


def time_training(
    shape: LlamaConfig, device: str, dtype: str, rate: float, tiny: bool, trees: int
) -> dict:
    """An optimizer step on packed trees, and one on the same trees pair by pair."""
    rng = random.Random(0)
    model = random_model(shape, device, torch.float32)
    for block in model.model.layers:
        block.recompute = not tiny
    computing = shard(model, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    config = TrainConfig(pack_tokens=2048)
    losses = LossConfig()
    lessons = [learn(random_tree(rng, shape.vocab_size, tiny), losses) for _ in range(trees)]
    pairwise = [branch for lesson in lessons for branch in branches(lesson)]

    def step(lessons, losses):
        _, counts = backward(computing, list(enumerate(lessons)), losses, config, 0, 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return counts

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counts = step(lessons, losses)
    seconds = clock(lambda: step(lessons, losses), device, 3)
    pairwise_seconds = clock(lambda: step(pairwise, LossConfig("rft")), device, 1)
    tokens = counts["unique_tokens"]
    flops = training_flops(model, tokens, sum(attended(lesson.tree) for lesson in lessons))
    return {
        "seconds": seconds,
        "tokens": tokens,
        "pairs": counts["pairs"],
        "flops": flops,
        "share": flops / seconds / rate,
        "pairwise": pairwise_seconds,
        "pairwise_tokens": counts["pairwise_tokens"],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan,
    }


def shortened_7b() -> LlamaConfig:
    """The 7B shape with as many layers as one GPU can train."""
    shape = SHAPES["7B"]
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    layer = shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    # 18 bytes for each weight, 30 GB for activations and logits
    room = torch.cuda.mem_get_info()[0] - 30e9 - 18 * embeddings
    return replace(shape, num_hidden_layers=max(1, min(32, int(room / (18 * layer)))))


def print_training(device: str, dtype: str, rate: float, tiny: bool) -> list[dict]:
    """Time training steps of some shapes, and print a line for each."""
    if tiny:
        cases = [("tiny", SHAPES["tiny"], 2)]  # name, shape, trees of a step
    else:
        seven = shortened_7b()
        name = f"7B, {seven.num_hidden_layers} layers"
        cases = [(name, seven, 12), ("1B", SHAPES["1B"], 12)]
    print(
        f"\n{'training':16}{'tokens':>8}{'pairs':>7}{'floor s':>9}{'step s':>9}{'of rate':>9}"
        f"{'tokens/s':>10}{'pairwise s':>12}{'ratio':>7}{'peak GB':>9}"
    )
    rows = []
    for name, shape, trees in cases:
        found = time_training(shape, device, dtype, rate, tiny, trees)
        rows.append({"shape": name, **found})
        seconds = found["seconds"]
        print(
            f"{name:16}{found['tokens']:8.0f}{found['pairs']:7.0f}{found['flops'] / rate:9.3f}"
            f"{seconds:9.3f}{100 * found['share']:8.1f}%{found['tokens'] / seconds:10.0f}"
            f"{found['pairwise']:12.3f}{found['pairwise'] / seconds:7.2f}{found['peak_gb']:9.1f}",
            flush=True,
        )
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


# ------------------------------------------------------------------------------------------ search


def print_search(device: str, dtype: str, tiny: bool) -> dict:
    """Run bench.py search on a 1B-shaped model of random weights, with the tokens of the built-in
    task. The peer is measured where transformers is installed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = replace(SHAPES["tiny" if tiny else "1B"], eos_token_id=0)
        save_model(random_model(shape, "cpu", getattr(torch, dtype)), folder)
        task_tokenizer("arithmetic").save(f"{folder}/tokenizer.json")
        words = ["--model", folder, "--device", device, "--dtype", dtype, *search_flags(tiny)]
        for side in ("ours", "peer"):
            command = [sys.executable, HERE / "bench.py", "search", *words, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"search, {side}: not measured ({last_line(done.stderr)})")
                continue
            row = found[side] = json.loads(last_line(done.stdout))
            print(
                f"search, {side}: {row['nodes'] / row['seconds']:.1f} nodes/s, "
                f"{row['sampled_tokens'] / row['seconds']:.0f} tokens/s, "
                f"{row['peak_mb'] / 1e3:.1f} GB",
                flush=True,
            )
    if len(found) == 2:
        ours, peer = (row["nodes"] / row["seconds"] for row in found.values())
        print(f"search: {ours / peer:.1f} times the nodes/s of the peer")
    return found


def search_flags(tiny: bool) -> list[str]:
    """The flags of bench.py search that do not depend on the device."""
    words = "--data arithmetic --search-rows 64"
    if tiny:
        words += " --max-step-tokens 8 --questions 4 --live 2 --simulations 2"
    else:
        words += " --max-step-tokens 48 --questions 128 --live 64 --simulations 8"
        words += " --cache-tokens 400000"
    return words.split()


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    config = parser.parse_args()
    if not config.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs anywhere")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}")
    kind = getattr(torch, dtype)
    bandwidth, rate = roofs(device, kind, config.tiny)
    print(f"a copy: {bandwidth / 1e9:.0f} GB/s; ", end="")
    print(f"a matrix product: {rate / 1e12:.2f} TFLOP/s", flush=True)
    found = {"bandwidth": bandwidth, "rate": rate}
    if "decoding" in config.parts:
        names = ["tiny"] if config.tiny else ["7B", "1B"]
        found["decoding"] = print_decoding(names, device, kind, bandwidth, config.tiny)
    if "search" in config.parts:
        found["search"] = print_search(device, dtype, config.tiny)
    if "training" in config.parts:
        found["training"] = print_training(device, dtype, rate, config.tiny)
    if config.json:
        config.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
