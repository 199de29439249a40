"""What one GPU allows and what is reached: decoding, training, peak memory, search. Random weights, no network, under 8 minutes.

    python bench.py gpu            on a GPU; --tiny takes small shapes anywhere, only to see that it runs

Floors: a decoding tick must read the weights and the cached keys and values once, at the bandwidth that a plain copy reaches; a training step must
do 6 FLOPs a weight and unique token, and 12 a layer, width and pair of tokens that see each other, at the rate that a large matrix product reaches.
"""
import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data import SourceConfig, StepTokenizer, run_command, task_tokenizer  # noqa: E402
from mcts import Driver  # noqa: E402
from model import Llama, LlamaConfig, TreeCache, save_model  # noqa: E402
from support.graphs import Graphed  # noqa: E402
from support.ranks import join_ranks  # noqa: E402
from svpo import LossConfig, Tree, TreeNode, learn, path  # noqa: E402
from train import TrainConfig, backward, shard  # noqa: E402

SHAPES = {"7B": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 8192), "1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, tie_word_embeddings=True),
          "tiny": LlamaConfig(64, 64, 128, 2, 4, 2, 16, 2048)}


def clock(action, device: str, repeats: int = 10) -> float:
    """Median seconds, after two runs to warm up."""
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
    count, size = (2**20, 256) if tiny else (2**30, 8192)
    source = torch.empty(count, dtype=dtype, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * source.element_size() / clock(lambda: target.copy_(source), device)
    one, two = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return bandwidth, 2 * size**3 / clock(lambda: one @ two, device)


def random_model(shape: LlamaConfig, device: str, dtype: torch.dtype) -> Llama:
    """Weights small enough that nothing overflows."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Llama(shape)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    return model.eval()


def kernels(action) -> dict[str, float]:
    """Seconds of CUDA kernels by kind, of one run."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        action()
        torch.cuda.synchronize()
    kinds = {"matrix products": ("gemm", "cutlass", "nvjet", "matmul", "gemv", "splitk"), "attention": ("fmha", "flash", "attention", "softmax", "flex")}
    found = {"matrix products": 0.0, "attention": 0.0, "other kernels": 0.0}
    for event in watched.key_averages():
        kind = next((kind for kind, marks in kinds.items() if any(mark in event.key.lower() for mark in marks)), "other kernels")
        found[kind] += event.self_device_time_total / 1e6
    return found


# --------------------------------------------------------------------------------------------- decoding

@torch.inference_mode()
def decode(model: Llama, device: str, dtype: torch.dtype, live: int, cached: int, lanes: int = 4) -> dict:
    """One tick of `live` sequences, four siblings a row, each row with `cached` tokens: mcts.Driver.compute, as the driver replays it."""
    shape, lanes = model.config, min(lanes, live)
    rows, vocabulary = live // lanes, shape.vocab_size
    cache = TreeCache(shape, rows, cached + 1, 0, device, dtype)
    cache.slots_L2BSGK.normal_(0, 0.1)
    tokenizer = SimpleNamespace(tables_4V=torch.zeros(4, vocabulary))
    tokenizer.draw = partial(StepTokenizer.draw, tokenizer)
    state = SimpleNamespace(model=model, tokenizer=tokenizer, temperature=1.0, cache=cache, lanes=lanes,
                            hidden_XD=torch.randn(live, shape.hidden_size, device=device, dtype=dtype))
    tick = Graphed(partial(Driver.compute, state), state.hidden_XD)
    lane_X = torch.arange(live, device=device)
    mask_B1NS = torch.zeros(rows, 1, lanes, cached, dtype=torch.bool, device=device)
    mask_B1NS[..., :cached - lanes] = True
    slot_X = cached - lanes + lane_X % lanes
    mask_B1NS.view(live, cached)[lane_X, slot_X] = True
    inputs = (lane_X, torch.rand(live, device=device), torch.full((live,), -1, device=device), slot_X, torch.full((live,), cached, device=device), mask_B1NS)
    seconds = clock(lambda: tick(*inputs).cpu(), device)
    size = torch.finfo(dtype).bits // 8
    weights = size * sum(parameter.numel() for name, parameter in model.named_parameters() if shape.tie_word_embeddings or "embed_tokens" not in name)
    keys = size * rows * cached * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return {"seconds": seconds, "weights": weights, "keys": keys, "kernels": kernels(lambda: tick(*inputs)) if device == "cuda" else {}}


def print_decoding(names: list[str], device: str, dtype: torch.dtype, bandwidth: float, tiny: bool) -> list[dict]:
    rows = []
    print(f"\n{'decoding':10}{'live':>6}{'cached':>8}{'GB read':>9}{'floor ms':>10}{'tick ms':>9}{'of bandwidth':>14}{'tokens/s':>10}   largest loss")
    for name in names:
        model = random_model(SHAPES[name], device, dtype)
        for live in (1, 8) if tiny else (1, 8, 64, 128, 256, 512):
            for cached in (64, 128) if tiny else (512, 1024, 2048, 4096):
                shape = model.config
                room = torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf
                if 2.2 * max(1, live // 4) * cached * 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim > room:
                    continue
                found = decode(model, device, dtype, live, cached)
                floor = (found["weights"] + found["keys"]) / bandwidth
                losses = {"matrix products": found["kernels"].get("matrix products", 0) - found["weights"] / bandwidth,
                          "attention": found["kernels"].get("attention", 0) - found["keys"] / bandwidth, "other kernels": found["kernels"].get("other kernels", 0),
                          "between kernels": found["seconds"] - sum(found["kernels"].values())}
                worst = max(losses, key=losses.get)
                rows.append({"shape": name, "live": live, "cached": cached, "floor": floor, **found})
                print(f"{name:10}{live:6}{cached:8}{(found['weights'] + found['keys']) / 1e9:9.2f}{1e3 * floor:10.3f}{1e3 * found['seconds']:9.3f}"
                      f"{100 * floor / found['seconds']:13.1f}%{live / found['seconds']:10.0f}   " + (f"{worst} {1e3 * losses[worst]:.3f} ms" if found["kernels"] else "-"), flush=True)
        del model
    return rows


# --------------------------------------------------------------------------------------------- training

def random_tree(rng: random.Random, vocabulary: int, tiny: bool) -> Tree:
    """As search leaves them: 16 expansions of 4 children, steps of about 40 tokens, a prompt of 200."""
    prompt, step, expansions = (20, 5, 12) if tiny else (200, 40, 16)

    def words(count):
        return [rng.randrange(vocabulary) for _ in range(count)]
    nodes, depth = [TreeNode(-1, words(prompt), [False] * prompt)], [0]
    for _ in range(expansions):
        leaf = rng.choice([index for index in range(len(nodes)) if depth[index] < 5 and all(node.parent != index for node in nodes)])
        for _ in range(4):
            count, reward = rng.randint(step // 2, 3 * step // 2), rng.choice((-1.0, 1.0)) if depth[leaf] == 4 else None
            nodes.append(TreeNode(leaf, words(count), [True] * count, -float(count), 0.4, 1, reward or rng.uniform(-1, 1), 0.0, reward, "answer" if reward else None))
            depth.append(depth[leaf] + 1)
    return Tree(str(rng.random()), "", "", nodes, expansions)


def train_step(shape: LlamaConfig, device: str, dtype: str, rate: float, tiny: bool, trees: int) -> dict:
    """A tree-packed optimizer step, and the same trees pair by pair: every pair's two paths as branches of their own."""
    rng = random.Random(0)
    model = random_model(shape, device, torch.float32).train()
    for block in model.model.layers:
        block.recompute = not tiny
    shard(model, dtype)
    optimizer, losses, config = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), LossConfig(), TrainConfig(pack_tokens=2048)
    lessons = [learn(random_tree(rng, shape.vocab_size, tiny), losses) for _ in range(trees)]
    branches = []
    for lesson in lessons:
        nodes = lesson.tree.nodes
        for win, lose, _ in lesson.pairs:
            for end in (win[-1], lose[-1]):
                line = [0, *path(lesson.tree, end)]
                branch = [TreeNode(place - 1, nodes[index].tokens, nodes[index].sampled, nodes[index].logp, 0.4, 1, 0.5, 0.0, 1.0 if index == end else None) for place, index in enumerate(line)]
                branches.append(learn(Tree("", "", "", branch), LossConfig("rft")))

    def step(chosen, losses):
        _, counts = backward(model, list(enumerate(chosen)), losses, config, 0, 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return counts
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counts = step(lessons, losses)
    seconds = clock(lambda: step(lessons, losses), device, 3)
    pairwise = clock(lambda: step(branches, LossConfig("rft")), device, 1)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name)
    seen = sum(len(lesson.tree.nodes[index].tokens) * sum(len(lesson.tree.nodes[above].tokens) for above in [0, *path(lesson.tree, index)])
               for lesson in lessons for index in range(len(lesson.tree.nodes)))  # pairs of tokens, a token of its own step counted whole: a little too many
    flops = 6 * (weights + shape.vocab_size * shape.hidden_size) * counts["unique_tokens"] + 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * seen / 2
    return {"seconds": seconds, "tokens": counts["unique_tokens"], "pairs": counts["pairs"], "flops": flops, "share": flops / seconds / rate, "pairwise": pairwise,
            "pairwise_tokens": counts["pairwise_tokens"], "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan}


def print_training(device: str, dtype: str, rate: float, tiny: bool) -> list[dict]:
    cases = [("tiny", SHAPES["tiny"], 2)]
    if not tiny:
        seven = SHAPES["7B"]
        layer = seven.hidden_size * (4 * seven.hidden_size + 3 * seven.intermediate_size)
        room = torch.cuda.mem_get_info()[0] - 30e9 - 16 * 2 * seven.vocab_size * seven.hidden_size  # activations, logits, embeddings
        layers = max(1, min(32, int(room / (18 * layer))))
        cases = [(f"7B, {layers} layers", LlamaConfig(**{**vars(seven), "num_hidden_layers": layers}), 12), ("1B", SHAPES["1B"], 12)]
    rows = []
    print(f"\n{'training':16}{'tokens':>8}{'pairs':>7}{'floor s':>9}{'step s':>9}{'of rate':>9}{'tokens/s':>10}{'pairwise s':>12}{'ratio':>7}{'peak GB':>9}")
    for name, shape, trees in cases:
        found = train_step(shape, device, dtype, rate, tiny, trees)
        rows.append({"shape": name, **found})
        print(f"{name:16}{found['tokens']:8.0f}{found['pairs']:7.0f}{found['flops'] / rate:9.3f}{found['seconds']:9.3f}{100 * found['share']:8.1f}%{found['tokens'] / found['seconds']:10.0f}"
              f"{found['pairwise']:12.3f}{found['pairwise'] / found['seconds']:7.2f}{found['peak_gb']:9.1f}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


# --------------------------------------------------------------------------------------------- search

def print_search(device: str, dtype: str, tiny: bool) -> dict:
    """bench.py search on a 1B-shaped model of random weights with the built-in task's tokens; the peer where transformers is installed."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = task_tokenizer("arithmetic")
        shape = LlamaConfig(**{**vars(SHAPES["tiny" if tiny else "1B"]), "eos_token_id": 0})
        save_model(random_model(shape, "cpu", getattr(torch, dtype)), folder)
        tokenizer.save(f"{folder}/tokenizer.json")
        words = ["--model", folder, "--data", "arithmetic", "--device", device, "--dtype", dtype, "--max-step-tokens", "8" if tiny else "48", "--search-rows", "64",
                 *(("--questions", "4", "--live", "2", "--simulations", "2") if tiny else ("--questions", "128", "--live", "64", "--simulations", "8", "--cache-tokens", "400000"))]
        found = {}
        for side in ("ours", "peer"):
            done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "search", *words, "--side", side], capture_output=True, text=True)
            if done.returncode:
                print(f"search, {side}: not measured ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
                continue
            row = found[side] = json.loads(done.stdout.splitlines()[-1])
            print(f"search, {side}: {row['nodes'] / row['seconds']:.1f} nodes/s, {row['sampled_tokens'] / row['seconds']:.0f} tokens/s, {row['peak_mb'] / 1e3:.1f} GB", flush=True)
    if len(found) == 2:
        print(f"search: {found['ours']['nodes'] / found['ours']['seconds'] / (found['peer']['nodes'] / found['peer']['seconds']):.1f} times the nodes/s of the peer")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    parser.add_argument("--parts", nargs="+", default=["decoding", "training", "search"], choices=["decoding", "training", "search"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    config = parser.parse_args()
    if not config.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs anywhere")
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {dtype}")
    bandwidth, rate = roofs(device, getattr(torch, dtype), config.tiny)
    print(f"a copy: {bandwidth / 1e9:.0f} GB/s; a matrix product: {rate / 1e12:.2f} TFLOP/s", flush=True)
    found = {"bandwidth": bandwidth, "rate": rate}
    if "decoding" in config.parts:
        found["decoding"] = print_decoding(["tiny"] if config.tiny else ["7B", "1B"], device, getattr(torch, dtype), bandwidth, config.tiny)
    if "search" in config.parts:
        found["search"] = print_search(device, dtype, config.tiny)
    if "training" in config.parts:
        join_ranks(SourceConfig(device=device, dtype=dtype))
        found["training"] = print_training(device, dtype, rate, config.tiny)
    if config.json:
        config.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
