"""Training on several ranks, and after interruptions, against one process left undisturbed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

WORDS = """
    --sft-questions 100 --search-questions 11 --valid-questions 4 --test-limit 4 --rounds 1
    --sft-steps 9 --sft-lr 1e-3 --sft-batch 15 --simulations 5 --tune-batch 5 --tune-epochs 3
    --min-gap 0.1 --save-every 2 --out out
""".split()


def start(folder: Path, *words, ranks: int = 1) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher = [sys.executable, *(torchrun if ranks > 1 else [])]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *WORDS, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(folder: Path, *words, ranks: int = 1) -> str:
    process = start(folder, *words, ranks=ranks)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return printed


def kill_at(folder: Path, stage: str, step: int, *words, ranks: int = 1):
    """Start, and kill everything once the log has that step of the stage."""
    process = start(folder, *words, ranks=ranks)
    wanted = f'"stage": "{stage}", "step": {step},'
    file = folder / "out" / "log.jsonl"
    while not file.exists() or wanted not in file.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    for entry in Path("/proc").glob("[0-9]*/cwd"):  # torchrun gives its ranks sessions of their own
        with contextlib.suppress(OSError):
            if os.readlink(entry) == str(folder):
                os.kill(int(entry.parent.name), signal.SIGKILL)
    process.communicate()


def log(folder: Path, stage: str) -> list[dict]:
    """The lines of a stage, without what depends on the machine."""
    lines = [json.loads(line) for line in open(folder / "out" / "log.jsonl")]
    lines = [line for line in lines if line.pop("stage") == stage]
    timed = ("_s", "blake2b")
    return [{name: line[name] for name in line if not name.endswith(timed)} for line in lines]


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    model = load_file(folder / "out" / stage / "model.safetensors")
    return model | load_file(folder / "out" / stage / "value_head.safetensors")


def take_back(folder: Path, stage: str, *kept: str):
    """Make the stage untrained again; its trees stay."""
    for path in (folder / "out" / stage).iterdir():
        if path.name not in ("trees-0.jsonl", *kept):
            path.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


def same(found: dict, wanted: dict, tolerance: float):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("stage", ["sft", "round1"])
def test_two_ranks_equal_one_process(finished, tmp_path, stage):
    """Catches losses normalised by a rank's own counts, gradients averaged wrongly, and dropout or
    order that depend on the ranks; their shares are unequal, 8 and 7 solutions a step or 3 and 2
    trees."""
    shutil.copytree(finished / "out", tmp_path / "out")
    take_back(tmp_path, stage)
    train(tmp_path, ranks=2)
    ours = log(tmp_path, stage)
    theirs = log(finished, stage)
    assert len(ours) == len(theirs) >= 6
    for one, two in zip(ours, theirs):
        assert one == pytest.approx(two, rel=1e-5, abs=3e-6)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    same(weights(tmp_path, stage), weights(finished, stage), 1e-5)


def test_forward_passes_of_few_tokens_are_the_same_step(finished, tmp_path):
    """Catches gradient accumulation that averages averages, and ranks of which one has nothing left
    to do."""
    shutil.copytree(finished / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["TrainConfig"] |= {"pack_tokens": 150, "recompute": True}
    del config["blake2b"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    take_back(tmp_path, "round1")
    train(tmp_path, "--pack-tokens", "150", "--recompute", ranks=2)
    for one, two in zip(log(tmp_path, "round1"), log(finished, "round1")):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_training_ends_with_the_same_weights(finished, tmp_path, ranks):
    """Catches a resumed run that repeats or skips a step, or loses the optimizer's state: bit for
    bit, also in the log."""
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        if ranks == 1:
            shutil.copytree(finished / "out", folder / "out")
            for stage in ("sft", "round1"):
                take_back(folder, stage)
            (folder / "out" / "log.jsonl").write_text("")
    if ranks > 1:
        train(undisturbed, ranks=ranks)
    kill_at(killed, "sft", 4, ranks=ranks)
    kill_at(killed, "round1", 3, ranks=ranks)
    lines = open(killed / "out" / "log.jsonl").readlines()
    before = {line for line in lines if '"step": 0,' in line or '"step": 1,' in line}
    train(killed, ranks=ranks)
    assert len(before) == 4
    # not trained again: the speeds are the same
    assert before <= set(open(killed / "out" / "log.jsonl"))
    against = finished if ranks == 1 else undisturbed
    for stage in ("sft", "round1"):
        same(weights(killed, stage), weights(against, stage), 0)
        assert log(killed, stage) == log(against, stage)
    assert not list((killed / "out").glob("*/checkpoint-*"))


def test_a_stale_reference_is_refused(finished, tmp_path):
    """Catches training against log-probabilities of other trees."""
    shutil.copytree(finished / "out", tmp_path / "out")
    take_back(tmp_path, "round1", "reference.safetensors")
    path = tmp_path / "out" / "round1" / "trees-0.jsonl"
    lines = path.read_text().splitlines()
    tree = json.loads(lines[0])
    del tree["blake2b"]
    tree["nodes"][1]["tokens"][0] = 3
    path.write_text("\n".join([json.dumps(tree), *lines[1:]]) + "\n")
    process = start(tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "reference.safetensors was computed with other trees" in errors.splitlines()[-1]


def test_groups_are_sampled_from_sharded_weights(tmp_path):
    """Catches GRPO that samples from another policy than the one it trains, or rewards that are
    lost: two ranks and one must agree."""
    words = """
        --objective grpo --tune-epochs 1 --sft-questions 500 --sft-steps 250 --sft-lr 3e-3
        --save-every 1000
    """.split()
    train(tmp_path, *words)
    wanted = log(tmp_path, "round1")
    assert len(wanted) == 2
    assert all(line["grad_norm"] > 0 and "policy" not in line for line in wanted)
    take_back(tmp_path, "round1")
    train(tmp_path, *words, ranks=2)
    for one, two in zip(log(tmp_path, "round1"), wanted):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    assert not (tmp_path / "out" / "round1" / "reference.safetensors").exists()


def test_bfloat16_computes_over_float32_weights(finished, tmp_path):
    """Catches master weights rounded to bfloat16 (steps of lr 1e-3 would be lost), and a flag
    without effect."""
    train(tmp_path, "--dtype", "bfloat16", "--rounds", "0")
    for one, two in zip(log(tmp_path, "sft"), log(finished, "sft"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02) and one["loss"] != two["loss"]
    kept = weights(tmp_path, "sft")
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in kept.values())
