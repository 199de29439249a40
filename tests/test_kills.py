"""Runs that are killed again and again end as if nothing had happened.

`SVPO_LONG=1` has 100 kills, otherwise there are 8.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from conftest import LONG, ROOT
from test_ranks import WORDS, log, same, train, weights

from data import read_trees

KILLS = 100 if LONG else 8
DYING = """
import os
import random
import runpy
import signal
import sys
import threading

kind, number, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:4]
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir")
seen = 0
timer = None

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def written(event, arguments):  # the path that an event writes to, if it is in the run folder
    writes = event in CHANGES
    if event == "open":
        writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not writes or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
        return ""
    path = os.fspath(arguments[0])
    return path if "out" in path.split(os.sep) else ""

def of_kind(path):
    if kind == "other":
        return "log" not in path and "checkpoint" not in path
    return kind in path

def hook(event, arguments):
    global seen, timer
    path = written(event, arguments)
    if not path:
        return
    if kind == "time" and timer is None:
        timer = threading.Timer(delay, kill)
        timer.daemon = True
        timer.start()
    elif kind != "time" and of_kind(path):
        seen += 1
        if seen == number and delay:
            threading.Timer(delay, kill).start()  # somewhere within the write
        elif seen == number:
            kill()  # right before it

sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, kind: str, number: int, delay: float) -> int:
    """train.py, which kills itself at the write `number` of a kind, or some time after it; returns
    its exit status."""
    words = [str(folder.parent / "dying.py"), kind, str(number), str(delay)]
    done = subprocess.run(
        [sys.executable, *words, str(ROOT / "train.py"), *WORDS],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def test_killed_anywhere(tmp_path):
    """Catches trees that are lost or doubled, steps that are trained twice or not at all, and files
    that a kill leaves half-written and a restart takes as whole: SIGKILL at random moments of SFT,
    search, training and answering, and at and within writes; weights must end bit for bit the
    same."""
    rng = random.Random(0)
    once = tmp_path / "once"
    once.mkdir()
    train(once)
    (tmp_path / "dying.py").write_text(DYING)
    young = tmp_path / "young"
    young.mkdir()
    for number in range(1, 13 if LONG else 5):  # at each write of a first start
        assert run(young, "other", number, 0) == -signal.SIGKILL
        if LONG or number in (2, 4):  # the same command resumes
            train(young)
            same(weights(young, "round1"), weights(once, "round1"), 0)
        shutil.rmtree(young / "out", ignore_errors=True)
    kills = writes = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        runs += 1
        for attempt in range(1000):
            kind = rng.choice(["time", "log", "checkpoint", "other"]) if kills < KILLS else "time"
            number = rng.randint(1, {"time": 1, "log": 8, "checkpoint": 30, "other": 12}[kind])
            delay = rng.uniform(0, 4) if kind == "time" else rng.choice([0.0, 0.0003, 0.001, 0.003])
            if kills >= KILLS or attempt > 25:  # let it end
                delay = 1e6
            if run(folder, kind, number, delay) == 0:
                break
            kills += 1
            writes += kind != "time"
        compare(folder, once)
        shutil.rmtree(folder)
    print(f"{kills} kills, {writes} of them at or within a write, over {runs} runs")
    assert not LONG or writes >= 25


def compare(folder: Path, once: Path):
    """Hold a run that was killed against one that was not."""
    for stage in ("sft", "round1"):
        same(weights(folder, stage), weights(once, stage), 0)
        assert log(folder, stage) == log(once, stage)  # every step once, in order
        found, wanted = (
            json.loads((place / "out" / stage / "eval.json").read_text())
            for place in (folder, once)
        )
        timed = {"answers": 0, "blake2b": 0}
        assert found | timed == wanted | timed
    found = read_trees(folder / "out" / "round1" / "trees-0.jsonl")
    wanted = read_trees(once / "out" / "round1" / "trees-0.jsonl")
    assert sorted(tree.id for tree in found) == sorted(tree.id for tree in wanted)
    for file in (folder / "out").rglob("*"):
        assert "checkpoint" not in file.name and not file.name.endswith(".partial")
