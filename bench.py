"""Speed and memory against peers, on the same weights, questions, pairs and token counts.

    python bench.py search --model FOLDER --data questions.jsonl --prompt FILE        against `transformers` generate
    python bench.py train --model FOLDER --data questions.jsonl --trees trees.jsonl   against TRL's DPOTrainer
    python bench.py gpu                                                               one GPU against its own limits

Each measurement is a process of its own; the sides alternate, and medians are printed. What the sides are stands in
experiments/sides.py, and for `gpu` in experiments/gpu.py. Needs the packages of tests/requirements.txt.
"""
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from data import SourceConfig, parse_args, run_command
from experiments.sides import SIDES, BenchConfig, pairs_of
from mcts import SearchConfig
from svpo import InputError


def flags(*stages, **changes) -> list[str]:
    """The stages' fields as words of a command line."""
    words = []
    for name, value in ({name: value for stage in stages for name, value in asdict(stage).items()} | changes).items():
        flagged = "--" + name.replace("_", "-")
        words += [flagged if value else f"--no-{name.replace('_', '-')}"] if isinstance(value, bool) else [flagged, str(value)]
    return words


def measure(stages: tuple, side: str, **changes) -> dict:
    """One measurement in a process of its own."""
    words = flags(*stages, **changes, side=side)
    done = subprocess.run([sys.executable, __file__, "search", *words], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the measurement of {side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "nodes_s": found["nodes"] / found["seconds"], "tokens_s": found["sampled_tokens"] / found["seconds"]}


def alternate(stages: tuple, alternations: int, sides: tuple) -> dict[str, dict]:
    """Medians of each side's figures; the sides take turns."""
    rows = {side: [] for side in sides}
    for _ in range(alternations):
        for side in sides:
            rows[side].append(measure(stages, side))
    return {side: {key: statistics.median(row[key] for row in found) for key in found[0]} for side, found in rows.items()}


def compare(stages: tuple, alternations: int, title: str, ours: str, peer: str):
    """Print the medians of two sides and their ratio."""
    median = alternate(stages, alternations, (ours, peer))
    print(f"\n{title}, medians of {alternations}")
    print(f"{'':14}{'nodes/s':>10}{'tokens/s':>10}{'seconds':>10}{'nodes':>8}{'tokens':>9}{'peak MB':>9}")
    for side, row in median.items():
        print(f"{side:14}{row['nodes_s']:10.2f}{row['tokens_s']:10.1f}{row['seconds']:10.1f}{row['nodes']:8.0f}"
              f"{row['sampled_tokens']:9.0f}{row['peak_mb']:9.0f}")
    print(f"{'ratio':14}" + "".join(f"{median[ours][key] / median[peer][key]:10.2f}" for key in ("nodes_s", "tokens_s")), flush=True)
    print("fed tokens, prompts included, a sampled token: " + ", ".join(
        f"{side} {row['fed_tokens'] / row['sampled_tokens']:.2f}" for side, row in median.items()), flush=True)


def compare_training(stages: tuple, alternations: int):
    """Print medians and ratios of our training and TRL's."""
    median = alternate(stages, alternations, ("train-ours", "trl", "trl-precomputed"))
    for row in median.values():
        row["whole"] = row["seconds"] + row["reference"]
    ours = median["train-ours"]
    print(f"one pass over {ours['pairs']:.0f} pairs of {ours['trees']:.0f} trees, medians of {alternations}\n"
          f"{'':18}{'seconds':>9}{'reference':>11}{'tokens':>9}{'peak MB':>9}{'loss':>12}   ratio of seconds with reference, tokens, peak")
    for side, row in median.items():
        ratios = ", ".join(f"{row[key] / ours[key]:.2f}" for key in ("whole", "processed", "peak_mb"))
        print(f"{side:18}{row['seconds']:9.1f}{row['reference']:11.1f}{row['processed']:9.0f}{row['peak_mb']:9.0f}"
              f"{row['loss']:12.6f}   {ratios}")


def main():
    command, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("", "-h", "--help"):
        words = ["--help"]
    elif command == "gpu":
        sys.exit(subprocess.run([sys.executable, Path(__file__).parent / "experiments" / "gpu.py", *words]).returncode)
    elif command not in ("search", "train"):
        raise InputError(f"bench.py {command}: there are search, train and gpu")
    stages = parse_args(__doc__, (SourceConfig, BenchConfig, SearchConfig), words, ("model", "data"))
    _, config, search = stages
    if config.side and config.side not in SIDES:
        raise InputError(f"--side {config.side}: there are {', '.join(SIDES)}")
    if config.side:
        print(json.dumps(SIDES[config.side](*stages)))
    elif command == "search":
        compare(stages, config.alternations, f"MCTS, {config.questions} questions, {config.live} at once, "
                f"{search.simulations} simulations of {search.expand_width}", "ours", "peer")
        compare(stages, config.alternations, f"sampling, 32 questions, {config.sample_tokens} tokens each", "sample-ours", "sample-peer")
    else:
        pairs_of(*stages[:2])
        compare_training(stages, config.alternations)


if __name__ == "__main__":
    run_command(main)
