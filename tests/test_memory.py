"""A long search takes no more memory than a short one. With `SVPO_LONG=1` it lasts 30 minutes, otherwise two."""
import json
import os
import subprocess
import sys
import time

import pytest

from conftest import LONG, ROOT

SECONDS = 1800 if LONG else 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_flat(tmp_path, model_folder):
    """Catches what grows with the questions answered: trees, generators or cache slots that are kept. Sampled each second; the mean of the last third
    must be within 2 % of that of the second third."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"question": f"{a % 7}+{a % 5}*{a % 6}-3", "answer": "2", "id": str(a)}) + "\n" for a in range(300_000)))
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen([sys.executable, ROOT / "mcts.py", "--model", model_folder, "--data", "sums.jsonl", "--max-step-tokens", "8", "--max-depth", "4",
                                    "--simulations", "8", "--out", "trees.jsonl"], cwd=tmp_path, stdout=errors, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = []
        while not (tmp_path / "trees.jsonl").exists() or not (tmp_path / "trees.jsonl").stat().st_size:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.2)
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            assert process.poll() is None, "the search ended: give it more questions"
            found.append(int(open(f"/proc/{process.pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
            time.sleep(1)
        process.kill()
        process.wait()
    third = len(found) // 3
    second, last = (sum(part) / third for part in (found[third:2 * third], found[2 * third:3 * third]))
    trees = (tmp_path / "trees.jsonl").read_bytes().count(b"\n")
    print(f"{trees} trees in {SECONDS} s; resident {second:.1f} MB in the second third, {last:.1f} MB in the last ({100 * (last / second - 1):+.2f} %)")
    assert abs(last / second - 1) < 0.02
