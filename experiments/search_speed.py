"""Where a search's time goes, how its cost grows, and what a second rank adds.

python experiments/search_speed.py ranks --model FOLDER --data questions.jsonl --prompt FILE
                                                one rank against two
python experiments/search_speed.py growth ...   cost against simulations, live questions and
                                                prompt length
python experiments/search_speed.py profile ...  shares of matrix products, attention, other
                                                kernels and Python
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import RECIPES, SourceConfig, read_trees
from experiments.bench import flags, last_line, measure
from experiments.sides import BenchConfig, search_ours
from mcts import SearchConfig
from support.flags import InputError, parse_args, run_command

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def ranks(source: SourceConfig, config: BenchConfig, search: SearchConfig):
    """Alternate mcts.py with one rank and with two. Loading is not timed."""
    rates = {1: [], 2: []}  # number of ranks -> nodes a second
    for number in range(2 * config.alternations):
        count = 1 + number % 2
        rates[count].append(search_rate(source, config, search, count))
    one = statistics.median(rates[1])
    two = statistics.median(rates[2])
    print(
        f"{config.questions} questions: one rank {one:.2f} nodes/s, two ranks {two:.2f} nodes/s, "
        f"ratio {two / one:.2f} (medians of {config.alternations})"
    )


def search_rate(
    source: SourceConfig, config: BenchConfig, search: SearchConfig, count: int
) -> float:
    """Nodes a second of mcts.py with `count` ranks of one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        changes = {"limit": config.questions, "search_rows": config.live}
        words = flags(source, search, **changes, out=f"{folder}/trees.jsonl")
        done = subprocess.run(
            [*launch, ROOT / "mcts.py", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds = [float(found) for found in re.findall(r"trees in ([\d.]+) s", done.stdout)]
        if done.returncode or len(seconds) != count:
            raise InputError(f"{count} ranks failed: {last_line(done.stderr)}")
        trees = [tree for file in Path(folder).glob("trees*.jsonl") for tree in read_trees(file)]
    nodes = sum(len(tree.nodes) - 1 for tree in trees)
    return nodes / max(*seconds, 0.05)  # mcts.py prints tenths: 0.0 s is at most 0.05 s


def growth(configs: tuple):
    """Print our cost against simulations, live questions and prompt length."""
    live = configs[1].live
    for count in (8, 16, 32, 64):
        changes = {"simulations": count, "questions": 3 * live, "cache_tokens": live * 16384}
        print_cost("simulations", count, measure(configs, "ours", **changes))
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        changes = {"simulations": 4, "live": count, "questions": count}
        row = measure(configs, "ours", **changes, cache_tokens=count * 4096)
        print_cost("live questions", count, row)
    for count in (128, 256, 512, 1024):
        changes = {"simulations": 8, "prompt": "", "prompt_tokens": count, "questions": live}
        row = measure(configs, "ours", **changes)
        print_cost("prompt tokens", row["prompt_tokens"], row)


def print_cost(name: str, value: float, row: dict):
    """Print the figures of one measurement."""
    print(
        f"{name:>14} {value:>5}: {row['seconds']:8.1f} s, {row['nodes_s']:8.2f} nodes/s, "
        f"{row['tokens_s']:8.1f} tokens/s, {row['seconds'] / row['simulations']:.3f} s a "
        f"simulation, {1000 * row['seconds'] / row['ticks']:.1f} ms a tick, "
        f"{row['peak_mb']:.0f} MB",
        flush=True,
    )


def profile(configs: tuple):
    """Print where a search's time goes.

    Kernels are timed by the profiler of PyTorch, the whole by the clock in a run without it.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    seconds = search_ours(*configs)["seconds"]
    watched = profiler(activities=[ProfilerActivity.CPU])
    slower = search_ours(*configs, watch=watched)["seconds"]
    spent = {"matrix products": 0.0, "attention": 0.0, "other kernels": 0.0}
    for event in watched.key_averages():
        if event.key.startswith("aten::"):
            spent[operator_kind(event.key)] += event.self_cpu_time_total / 1e6
    spent["Python and the rest"] = seconds - sum(spent.values())
    shares = [f"{kind} {100 * part / seconds:.1f} %" for kind, part in spent.items()]
    print(f"{seconds:.1f} s of search ({slower:.1f} s under the profiler): {', '.join(shares)}")


def operator_kind(name: str) -> str:
    """What an operator of PyTorch does."""
    if name in MATRIX_PRODUCTS:
        return "matrix products"
    return "attention" if "scaled_dot_product" in name else "other kernels"


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    words = sys.argv[2:] if command else ["--help"]
    configs = (SourceConfig, BenchConfig, SearchConfig)
    configs = parse_args(__doc__, configs, words, ("model", "data"), RECIPES)
    if command == "ranks":
        ranks(*configs)
    elif command == "growth":
        growth(configs)
    elif command == "profile":
        profile(configs)
    else:
        raise InputError(f"search_speed.py {command}: there are ranks, growth and profile")


if __name__ == "__main__":
    run_command(main)
