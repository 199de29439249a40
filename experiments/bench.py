"""Speed and memory against other programs, on the same weights, questions, pairs and token counts.

    python experiments/bench.py search --model FOLDER --data questions.jsonl --prompt FILE
                                            against `generate` of transformers; --vllm: and vLLM;
                                            --ladder: against ourselves, less one optimisation
    python experiments/bench.py train --model FOLDER --data questions.jsonl --trees trees.jsonl
                                            against DPOTrainer of TRL
    python experiments/bench.py gpu         one GPU against its own limits

Each measurement runs in a process of its own. The sides take turns, and medians are printed. What
the sides do stands in experiments/sides.py, and for `gpu` in experiments/gpu.py. The packages of
tests/requirements.txt are needed.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from data import RECIPES, SourceConfig
from experiments.sides import LADDER, SIDES, BenchConfig, read_pairs
from mcts import SearchConfig
from support.flags import InputError, flag_name, parse_args, run_command


def flags(*configs, **changes) -> list[str]:
    """The configs' fields as words of a command line. Empty ones are left out: they are empty by
    default."""
    values = {}
    for stage in configs:
        values |= asdict(stage)
    words = []
    for name, value in (values | changes).items():
        if isinstance(value, bool):
            words.append(flag_name(name if value else f"no_{name}"))
        elif value != "":
            words += [flag_name(name), str(value)]
    return words


def last_line(text: str) -> str:
    """The last line of what a command printed."""
    return (text.strip().splitlines() or ["no message"])[-1]


def measure(configs: tuple, side: str, **changes) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "search", *flags(*configs, **changes, side=side)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the measurement of {side} failed: {last_line(done.stderr)}")
    found = json.loads(last_line(done.stdout))
    nodes_s = found["nodes"] / found["seconds"]
    tokens_s = found["sampled_tokens"] / found["seconds"]
    return {**found, "nodes_s": nodes_s, "tokens_s": tokens_s}


def alternate(configs: tuple, alternations: int, sides: tuple) -> dict[str, dict]:
    """Medians of each side's figures.

    The sides take turns, there and back: as a machine gets faster or slower, that favours none.
    """
    rows = {side: [] for side in sides}
    for number in range(alternations):
        for side in sides[:: -1 if number % 2 else 1]:
            rows[side].append(measure(configs, side))
    medians = {}
    for side, found in rows.items():
        medians[side] = {key: statistics.median(row[key] for row in found) for key in found[0]}
    return medians


def compare(configs: tuple, alternations: int, title: str, ours: str, *peers: str):
    """Print the medians of all sides, and our ratio to each of the others."""
    medians = alternate(configs, alternations, (ours, *peers))
    print(f"\n{title}, medians of {alternations}")
    print(
        f"{'':22}{'nodes/s':>10}{'tokens/s':>10}{'seconds':>10}{'nodes':>8}{'tokens':>9}"
        f"{'peak MB':>9}"
    )
    for side, row in medians.items():
        print(
            f"{side:22}{row['nodes_s']:10.2f}{row['tokens_s']:10.1f}{row['seconds']:10.1f}"
            f"{row['nodes']:8.0f}{row['sampled_tokens']:9.0f}{row['peak_mb']:9.0f}"
        )
    for peer in peers:
        ratios = [medians[ours][key] / medians[peer][key] for key in ("nodes_s", "tokens_s")]
        print(f"{'to ' + peer:22}" + "".join(f"{ratio:10.2f}" for ratio in ratios))
    fed = {side: row["fed_tokens"] / row["sampled_tokens"] for side, row in medians.items()}
    text = ", ".join(f"{side} {share:.2f}" for side, share in fed.items())
    print(f"fed tokens, prompts included, for each sampled token: {text}", flush=True)


def compare_search(configs: tuple):
    """Print the comparisons of tree search and of plain sampling."""
    _, config, search = configs
    title = (
        f"MCTS, {config.questions} questions, {config.live} at once, "
        f"{search.simulations} simulations of {search.expand_width}"
    )
    if config.ladder:
        peers = tuple(LADDER)
    else:
        peers = ("peer", "vllm") if config.vllm else ("peer",)
    compare(configs, config.alternations, title, "ours", *peers)
    title = f"sampling, 32 questions, {config.sample_tokens} tokens each"
    peers = [f"sample-{peer}" for peer in peers]
    compare(configs, config.alternations, title, "sample-ours", *peers)


def compare_training(configs: tuple):
    """Print medians and ratios of our training and TRL's."""
    source, config, _ = configs
    read_pairs(source, config)  # bad input ends here, before a process is started
    medians = alternate(configs, config.alternations, ("train-ours", "trl", "trl-precomputed"))
    for row in medians.values():
        row["whole"] = row["seconds"] + row["reference"]
    ours = medians["train-ours"]
    print(
        f"one pass over {ours['pairs']:.0f} pairs of {ours['trees']:.0f} trees, "
        f"medians of {config.alternations}"
    )
    print(
        f"{'':18}{'seconds':>9}{'reference':>11}{'tokens':>9}{'peak MB':>9}{'loss':>12}"
        "   ratio of seconds with reference, tokens, peak"
    )
    for side, row in medians.items():
        ratios = [row[key] / ours[key] for key in ("whole", "processed", "peak_mb")]
        print(
            f"{side:18}{row['seconds']:9.1f}{row['reference']:11.1f}{row['processed']:9.0f}"
            f"{row['peak_mb']:9.0f}{row['loss']:12.6f}   "
            + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        )


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    words = sys.argv[2:]
    if command in ("", "-h", "--help"):
        words = ["--help"]
    elif command == "gpu":
        sys.exit(subprocess.run([sys.executable, HERE / "gpu.py", *words]).returncode)
    elif command not in ("search", "train"):
        raise InputError(f"bench.py {command}: there are search, train and gpu")
    configs = (SourceConfig, BenchConfig, SearchConfig)
    configs = parse_args(__doc__, configs, words, ("model", "data"), RECIPES)
    side = configs[1].side
    if side and side not in SIDES:
        raise InputError(f"--side {side}: there are {', '.join(SIDES)}")
    if side:
        print(json.dumps(SIDES[side](*configs)))
    elif command == "search":
        compare_search(configs)
    else:
        compare_training(configs)


if __name__ == "__main__":
    run_command(main)
