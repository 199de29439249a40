"""What holds memory: the caches of searches that have ended, and a search that lasts long.

With `SVPO_LONG=1` the long search lasts 30 minutes, otherwise one.
"""

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from conftest import LONG, ROOT
from test_mcts import QUESTIONS

from engine import TreeCache
from eval import AnswerConfig, answer_questions
from mcts import SearchConfig, search_trees
from support.memory import c_library
from svpo import LossConfig
from train import Job, RunConfig, TrainConfig, train_stage

SECONDS = 1800 if LONG else 60


@pytest.fixture
def caches(monkeypatch) -> list[weakref.ref]:
    """All caches that are made, as weak references; the garbage collector does not run."""
    made = []
    most = []
    first = TreeCache.__init__

    def noted(self, *words, **more):
        made.append(weakref.ref(self))
        most.append(alive(made))
        first(self, *words, **more)

    monkeypatch.setattr(TreeCache, "__init__", noted)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()
    assert most and max(most) == 1  # each was gone before the next one was made


def alive(caches: list[weakref.ref]) -> int:
    return sum(cache() is not None for cache in caches)


KEEP = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from support import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

memory.keep_freed_memory()
before = resident()
tensors = [torch.ones(2**20) for _ in range(100)]
tensors.clear()
kept = resident() - before
memory.host_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not c_library(), reason="the GNU C library alone can keep and give back memory")
def test_freed_memory_is_kept_until_somebody_asks_how_much_is_free():
    """Catches memory that goes back to the system after each tensor, and memory that is kept but
    counted as used."""
    words = [sys.executable, "-c", KEEP, str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 300 and after < 100, done.stdout


def test_a_cache_is_gone_with_its_search(tmp_path, model, tokenizer, model_folder, caches):
    """Catches a reference cycle that keeps a finished search's gigabytes until a full garbage
    collection, so that the next search finds no memory: while answering, searching, leaving a
    search early, and sampling GRPO's groups between optimizer steps."""
    search = SearchConfig(
        simulations=4,
        expand_width=3,
        max_depth=3,
        max_step_tokens=6,
        search_rows=2,
        cache_tokens=4000,
    )
    answering = AnswerConfig(answer_lanes=8)
    kept = []  # results do not hold a cache
    for strategy in ("greedy", "majority:3", "beam:2,2", "mcts:3"):
        found = answer_questions(model, tokenizer, QUESTIONS, strategy, search, answering)
        kept.append(found)
        assert alive(caches) == 0, strategy
    kept.append(list(search_trees(model, tokenizer, QUESTIONS, search)))
    assert alive(caches) == 0
    left = search_trees(model, tokenizer, QUESTIONS, search)
    kept.append(next(left))
    assert alive(caches) == 1
    del left
    assert alive(caches) == 0
    assert len(caches) == 6
    steps = TrainConfig(tune_epochs=1, tune_batch=2, group=3)
    run = RunConfig(device="cpu")
    job = Job(run, steps, search, LossConfig("grpo"), answering, "cpu", tokenizer, tokenizer)
    stage = tmp_path / "run" / "round1"
    stage.mkdir(parents=True)
    train_stage(job, model_folder, stage, {"search": [QUESTIONS]}, 1)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert len(caches) == 6 + 3 and alive(caches) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_flat(tmp_path, model_folder):
    """Catches what grows with the questions answered: trees, generators or cache slots that are
    kept. Sampled each second; the mean of the last third must be within 2 % of that of the second
    third."""
    rows = []
    for number in range(300_000):
        question = f"{number % 7}+{number % 5}*{number % 6}-3"
        rows.append({"question": question, "answer": "2", "id": str(number)})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", model_folder, "--data", "sums.jsonl", "--out", "trees.jsonl"]
    words += ["--max-step-tokens", "8", "--max-depth", "4", "--simulations", "8"]
    trees = tmp_path / "trees.jsonl"
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, ROOT / "mcts.py", *words],
            cwd=tmp_path,
            stdout=errors,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found = []
        while not trees.exists() or not trees.stat().st_size:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.2)
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            assert process.poll() is None, "the search ended: give it more questions"
            found.append(resident_megabytes(process.pid))
            time.sleep(1)
        process.kill()
        process.wait()
    third = len(found) // 3
    second = sum(found[third : 2 * third]) / third
    last = sum(found[2 * third : 3 * third]) / third
    count = trees.read_bytes().count(b"\n")
    print(
        f"{count} trees in {SECONDS} s; resident {second:.1f} MB in "
        f"the second third, {last:.1f} MB in the last ({100 * (last / second - 1):+.2f} %)"
    )
    assert abs(last / second - 1) < 0.02


def resident_megabytes(process: int) -> float:
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20
