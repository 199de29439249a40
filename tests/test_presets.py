"""The command as a user types it: every preset, from caches that need no network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub import hub_cache
from preset_configs import CONFIGS, tiny_fields
from test_commands import write_rows
from test_steps import characters_tokenizer

from model import Llama, load_model, read_config, save_model
from support.hugging_face import PRESETS


def caches(root: Path, preset: str) -> dict[str, str]:
    """The environment of a command with a tiny twin of a preset in the hub's cache, and a few
    questions of GSM8K and MATH in the data cache."""
    folder = root / "twin"
    folder.mkdir(parents=True)
    characters = characters_tokenizer()
    characters.save(str(folder / "tokenizer.json"))
    fields = tiny_fields(preset, characters.get_vocab_size())
    fields |= {key: 0 for key in fields if key.endswith("token_id")}  # its only special token
    (folder / "config.json").write_text(json.dumps(fields))
    model = Llama(read_config(folder)).init_weights(0)
    newline = characters.encode("\n").ids[0]
    with torch.no_grad():  # short steps: hidden states are nearly ones, which these rows like
        model.model.embed_tokens.weight += 1
        model.output_weight()[newline] += 0.15
        model.output_weight()[0] += 0.1  # end-of-text
    save_model(model, root / "weights")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        shutil.copyfile(root / "weights" / name, folder / name)
    hub_cache(root / "hub", PRESETS[preset][0], folder)
    chain = "{0}+1=<<{0}+1={1}>>{1}\n#### {1}"
    data = root / "cache" / "svpo"
    for split, count in (("train", 2), ("test", 1)):
        rows, problems = [], []
        for a in range(count):
            text = f"{split} {a}"
            rows.append({"question": f"{text}+1?", "answer": chain.format(a, a + 1)})
            solution = f"It is $\\boxed{{{a + 3}}}$."
            problems.append({"problem": f"{text}+3?", "solution": solution, "answer": str(a + 3)})
        write_rows(data / "gsm8k" / f"{split}.jsonl", rows)
        write_rows(data / "math" / f"{split}.jsonl", problems)
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(root / "cache"),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def as_typed(preset: str, *more, root: Path) -> str:
    """What `torchrun train.py --model PRESET` prints, with no more flags than `more`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        ROOT / "train.py",
        "--model",
        preset,
        *more,
    ]
    done = subprocess.run(
        command, cwd=root, env=caches(root, preset), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_command_as_the_user_types_it(tmp_path):
    """Catches a recipe whose parts do not go together: the command with a preset and nothing else,
    a tiny twin of its model, and a few questions."""
    printed = as_typed("llama-7b", root=tmp_path)
    assert "data check: 100.0 % of 4 worked solutions count as right" in printed
    assert "2 unseen questions" in printed and "4 trees" in printed
    rows = [line.split()[0] for line in printed.split("unseen questions")[-1].splitlines()[2:]]
    assert rows == ["sft", "round1", "round2", "round3"]
    stored = json.loads((tmp_path / "runs" / "gsm8k-math-seed0" / "config.json").read_text())
    assert stored["SearchConfig"]["simulations"] == 40 and stored["RunConfig"]["rounds"] == 3
    assert load_model(tmp_path / "runs" / "gsm8k-math-seed0" / "round3").config.rms_norm_eps == 1e-6


@pytest.mark.parametrize("preset", [name for name in CONFIGS if name != "llama-7b"])
def test_the_other_presets_run(tmp_path, preset):
    """Catches a preset whose own config.json is refused, or whose model does not go through."""
    small = "--rounds 1 --simulations 2 --max-step-tokens 16 --max-depth 3 --max-tokens 128"
    printed = as_typed(preset, *small.split(), root=tmp_path)
    assert "4 trees" in printed and "2 unseen questions" in printed
