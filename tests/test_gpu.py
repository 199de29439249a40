"""The scripts for a GPU in their tiny modes, on whatever device is there."""

import json
import subprocess
import sys

from conftest import ROOT


def experiment(name, *words, cwd, seconds=300) -> str:
    """What a script of experiments/ prints."""
    command = [sys.executable, ROOT / "experiments" / name, *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_gpu_benchmark(tmp_path):
    """Catches a benchmark that cannot start when a GPU is there at last: all parts, all figures."""
    experiment("bench.py", "gpu", "--tiny", "--json", "out.json", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["bandwidth"] > 0 and found["rate"] > 0 and len(found["decoding"]) == 4
    assert all(0 < row["floor"] < row["seconds"] for row in found["decoding"])
    training = found["training"][0]
    assert training["pairs"] > 0 and 0 < training["share"] < 1
    assert training["pairwise_tokens"] > training["tokens"]
    assert "ours" in found["search"] and "peer" in found["search"]
