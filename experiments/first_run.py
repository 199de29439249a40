"""Seconds from `python train.py` to 90 % greedy answers on unseen questions of the built-in task.

    python experiments/first_run.py [--seeds 0 1 2] [flags of train.py]

The one number of this repository: the slowest seed counts. Each run is stopped as soon as the table
line of a stage has reached it; start-up, search, training and all answers until then are in it.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from support.files import head_commit, read_json
from support.flags import InputError, run_command

GOAL = 0.9


def first_run(seed: int, words: list[str]) -> tuple[float, str]:
    """Seconds until a stage reaches GOAL, and the greedy answers of all stages until then."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "train.py", "--seed", str(seed), "--out", out, *words]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        greedy = {}  # stage -> share of right answers
        try:
            while max(greedy.values(), default=0) < GOAL:
                ended = process.poll() is not None
                time.sleep(0.1)
                for file in out.glob("*/eval.json"):
                    row = read_json(file)
                    greedy[row["stage"]] = row["answers"][0]["accuracy"]
                if ended:
                    break
            seconds = time.perf_counter() - begin
        finally:
            process.terminate()
            process.wait()
    stages = ", ".join(f"{stage} {100 * share:.1f}" for stage, share in sorted(greedy.items()))
    if not greedy:
        raise InputError(f"seed {seed}: train.py ended without a table")
    if max(greedy.values()) < GOAL:
        seconds, stages = math.inf, f"{stages}: never {GOAL:.0%}"
    return seconds, stages


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    config, words = parser.parse_known_args()
    slowest = 0.0
    for seed in config.seeds:
        seconds, stages = first_run(seed, words)
        slowest = max(slowest, seconds)
        print(f"seed {seed}: {seconds:.0f} s; greedy {stages}", flush=True)
    print(f"slowest {slowest:.0f} s; commit {head_commit()[:7]}, {os.cpu_count()} cores")


if __name__ == "__main__":
    run_command(main)
