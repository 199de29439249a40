"""Where a search's time goes, how its cost grows, and what a second rank adds.

    python experiments/search_speed.py ranks --model FOLDER --data questions.jsonl --prompt prompts/word_problems.txt
    python experiments/search_speed.py growth --model ...       cost against simulations, live questions and prompt length
    python experiments/search_speed.py profile --model ...      share of matrix products, attention, other kernels and Python
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import BenchConfig, flags, measure  # noqa: E402
from data import SourceConfig, parse_args, read_trees, run_command  # noqa: E402
from experiments.sides import search_ours  # noqa: E402
from mcts import SearchConfig  # noqa: E402
from svpo import InputError  # noqa: E402


def ranks(source: SourceConfig, config: BenchConfig, search: SearchConfig):
    """Alternate mcts.py with one rank and with two, one thread each; loading is not timed."""
    rates = {1: [], 2: []}
    for number in range(2 * config.alternations):
        count = 1 + number % 2
        with tempfile.TemporaryDirectory() as folder:
            words = flags(source, search, limit=config.questions, search_rows=config.live, out=f"{folder}/trees.jsonl")
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                                   str(Path(__file__).parent.parent / "mcts.py"), *words],
                                  capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            seconds = [float(found) for found in re.findall(r"trees in ([\d.]+) s", done.stdout)]
            if done.returncode or len(seconds) != count:
                raise InputError(f"{count} ranks failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            trees = [tree for path in Path(folder).glob("trees*.jsonl") for tree in read_trees(path)]
        rates[count].append(sum(len(tree.nodes) - 1 for tree in trees) / max(seconds))
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    print(f"{config.questions} questions: one rank {one:.2f} nodes/s, two ranks {two:.2f} nodes/s, ratio {two / one:.2f} "
          f"(medians of {config.alternations})")


def profile(stages: tuple):
    """Where a search's time goes: kernels by the profiler of PyTorch, the whole by the clock, in a run without the profiler."""
    from torch.profiler import ProfilerActivity, profile as profiler
    seconds = search_ours(*stages)["seconds"]
    found = profiler(activities=[ProfilerActivity.CPU])
    slower = search_ours(*stages, watch=found)["seconds"]
    kinds = {"matrix products": 0.0, "attention": 0.0, "other kernels": 0.0}
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            kind = "matrix products" if event.key in ("aten::mm", "aten::addmm", "aten::bmm") else (
                "attention" if "scaled_dot_product" in event.key else "other kernels")
            kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["Python and the rest"] = seconds - sum(kinds.values())
    print(f"{seconds:.1f} s of search ({slower:.1f} s under the profiler): " + ", ".join(f"{kind} {100 * spent / seconds:.1f} %" for kind, spent in kinds.items()))


def growth(stages: tuple, live: int):
    """Our cost against simulations, live questions and prompt length."""
    def line(name, value, row):
        print(f"{name:>14} {value:>5}: {row['seconds']:8.1f} s, {row['nodes_s']:8.2f} nodes/s, {row['tokens_s']:8.1f} tokens/s, "
              f"{row['seconds'] / row['simulations']:.3f} s a simulation, {1000 * row['seconds'] / row['ticks']:.1f} ms a tick, {row['peak_mb']:.0f} MB", flush=True)
    for count in (8, 16, 32, 64):
        line("simulations", count, measure(stages, "ours", simulations=count, questions=3 * live, cache_tokens=live * 16384))
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        line("live questions", count, measure(stages, "ours", simulations=4, live=count, questions=count, cache_tokens=count * 4096))
    for count in (128, 256, 512, 1024):
        row = measure(stages, "ours", simulations=8, prompt="", prompt_tokens=count, questions=live)
        line("prompt tokens", row["prompt_tokens"], row)


def main():
    command, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", ["--help"])
    stages = parse_args(__doc__, (SourceConfig, BenchConfig, SearchConfig), words, ("model", "data"))
    if command not in ("ranks", "growth", "profile"):
        raise InputError(f"search_speed.py {command}: there are ranks, growth and profile")
    ranks(*stages) if command == "ranks" else growth(stages, stages[1].live) if command == "growth" else profile(stages)


if __name__ == "__main__":
    run_command(main)
