"""The scripts for a GPU in their tiny modes, on whatever device is there."""

import json
import shutil
import subprocess
import sys

import torch
from conftest import ROOT, tiny_config
from safetensors.torch import save_file
from test_steps import characters_tokenizer

from experiments import gsm8k
from model import Llama, load_model, save_model

STRATEGIES = ("greedy", "majority:5", "beam:1,5", "beam:3,5")


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


def test_weights_survive_their_parts(tmp_path, model_folder, monkeypatch):
    """Catches pieces of a tensor that are joined in another order, parts that are too large, and a
    tensor that is lost between two of them."""
    monkeypatch.setattr(gsm8k, "LARGEST", 700)  # bytes, less than most tensors have
    parts = gsm8k.cut_weights(model_folder)
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(parts):
        assert 0 < sum(piece.nbytes for piece in part.values()) <= 700
        save_file(part, tmp_path / "parts" / f"part-{number:02}.safetensors")
    shutil.copyfile(model_folder / "config.json", tmp_path / "parts" / "config.json")
    gsm8k.join(tmp_path / "parts", tmp_path / "joined")
    wanted = load_model(model_folder).bfloat16().float().state_dict()
    found = load_model(tmp_path / "joined").state_dict()
    assert len(parts) > 20 and found.keys() == wanted.keys()
    for name in wanted:
        assert "value_head" in name or torch.equal(wanted[name], found[name]), name


def test_gsm8k_in_pieces(tmp_path):
    """Catches parts that do not make the same model, a stop that loses work, and a table with rows
    missing."""
    folder = tmp_path / "model"
    save_model(Llama(tiny_config(vocab_size=97)).init_weights(0), folder)
    characters_tokenizer().save(str(folder / "tokenizer.json"))
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        with open(tmp_path / "gsm8k" / f"{split}.jsonl", "w") as file:
            for a in range(count):
                row = {"question": f"{split} {a}+1?", "answer": f"{a}+1={a + 1}\n#### {a + 1}"}
                file.write(json.dumps(row) + "\n")
    prepare = ["prepare", "--model", folder, "--data-dir", ".", "--parts", "parts"]
    assert "1 parts" in experiment("gsm8k.py", *prepare, cwd=tmp_path)
    run = ["gsm8k.py", "run", "--parts", "parts", "--out", "out", "--tiny", "--minutes"]
    stopped = experiment(*run, "0.02", cwd=tmp_path, seconds=100)
    assert stopped.endswith("not done; run the same command again\n")
    printed = experiment(*run, "9", cwd=tmp_path, seconds=400)
    assert printed.endswith("done\n") and "sft 3 optimizer steps" in printed
    table = printed.split("sampled tokens")[-1]
    assert all(table.count(name) >= 2 for name in STRATEGIES)
    wanted = load_model(folder).bfloat16().float().state_dict()
    found = load_model(tmp_path / "out" / "model").state_dict()
    for name in wanted:
        assert "value_head" in name or torch.equal(wanted[name], found[name]), name
