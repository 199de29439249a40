"""Runs that are killed again and again end as if nothing had happened. `SVPO_LONG=1` has 100 kills, otherwise there are 8."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys

from conftest import LONG, ROOT
from data import read_trees
from test_ranks import WORDS, log, same, train, weights

KILLS = 100 if LONG else 8
DYING = '''
import os, random, runpy, signal, sys, threading
kind, number, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:4]
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
seen, timer = 0, None

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    global seen, timer
    if event == "open":
        writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        writes = event in ("os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir")
    path = os.fspath(arguments[0]) if arguments and isinstance(arguments[0], (str, os.PathLike)) else ""
    if not writes or "out" not in path.split(os.sep):
        return
    if kind == "time" and timer is None:
        timer = threading.Timer(delay, kill)
        timer.daemon = True
        timer.start()
    elif kind != "time" and (kind in path) == (kind != "other") and (kind != "other" or "log" not in path and "checkpoint" not in path):
        seen += 1
        if seen == number and delay:
            threading.Timer(delay, kill).start()  # somewhere within the write
        elif seen == number:
            kill()  # right before it

sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
'''


def test_killed_anywhere(tmp_path):
    """Catches trees that are lost or doubled, steps that are trained twice or not at all, and files that a kill leaves half-written and a restart
    takes as whole: SIGKILL at random moments of SFT, search, training and answering, and at and within writes; weights must end bit for bit the same."""
    rng, kills, writes, runs = random.Random(0), 0, 0, 0
    (tmp_path / "once").mkdir()
    train(tmp_path / "once")
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "young").mkdir()
    for number in range(1, 13 if LONG else 5):  # at each write of a first start
        words = [sys.executable, str(tmp_path / "dying.py"), "other", str(number), "0", str(ROOT / "train.py"), *WORDS]
        done = subprocess.run(words, cwd=tmp_path / "young", capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        if LONG or number in (2, 4):  # the same command goes on
            train(tmp_path / "young")
            same(weights(tmp_path / "young", "round1"), weights(tmp_path / "once", "round1"), 0)
        shutil.rmtree(tmp_path / "young" / "out", ignore_errors=True)
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
            process = subprocess.run([sys.executable, str(tmp_path / "dying.py"), kind, str(number), str(delay), str(ROOT / "train.py"), *WORDS], cwd=folder,
                                     capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
            kills += 1
            writes += kind != "time"
        for stage in ("sft", "round1"):
            same(weights(folder, stage), weights(tmp_path / "once", stage), 0)
            assert log(folder, stage) == log(tmp_path / "once", stage)  # every step once, in order
            assert {**json.loads((folder / "out" / stage / "eval.json").read_text()), "answers": 0} == {**json.loads(
                (tmp_path / "once" / "out" / stage / "eval.json").read_text()), "answers": 0}
        trees, wanted = (read_trees(place / "out" / "round1" / "trees-0.jsonl") for place in (folder, tmp_path / "once"))
        assert sorted(tree.id for tree in trees) == sorted(tree.id for tree in wanted)
        assert not [path for path in (folder / "out").rglob("*") if "checkpoint" in path.name or path.name.endswith(".partial")]
        shutil.rmtree(folder)
    print(f"{kills} kills, {writes} of them at or within a write, over {runs} runs")
    assert not LONG or writes >= 25
