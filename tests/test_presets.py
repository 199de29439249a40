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
from test_commands import write_rows
from test_steps import characters_tokenizer

from model import Llama, load_model, read_config, save_model
from support.hugging_face import PRESETS

LLAMA = {  # config.json of the first LLaMA, made small
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0",
    "use_cache": True,
    "vocab_size": 97,
}
# fields of the presets' own config.json beside the sizes
LLAMA_2 = {"hidden_act": "silu", "pretraining_tp": 1, "rms_norm_eps": 1e-5, "bos_token_id": 1}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "max_position_embeddings": 4096,
}
LLAMA_3 = {
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SMOLLM = {
    "is_llama_config": True,
    "num_key_value_heads": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
TWINS = {
    "llama-7b": {},
    "llama-2-7b": {**LLAMA_2, "max_position_embeddings": 4096},
    "llama-3.1-8b": LLAMA_3,
    "deepseekmath-7b": {**LLAMA_2, "max_position_embeddings": 4096, "rope_scaling": None},
    "qwen2.5-math-1.5b": QWEN,
    "qwen2.5-math-7b": {**QWEN, "tie_word_embeddings": False},
    "smollm2-135m": SMOLLM,
    "smollm2-360m": SMOLLM,
}


def caches(root: Path, preset: str) -> dict[str, str]:
    """The environment of a command with a tiny twin of a preset in the hub's cache, and a few
    questions of GSM8K and MATH in the data cache."""
    folder = root / "twin"
    folder.mkdir(parents=True)
    characters_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({**LLAMA, **TWINS[preset]}))
    model = Llama(read_config(folder)).init_weights(0)
    newline = characters_tokenizer().encode("\n").ids[0]
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


@pytest.mark.parametrize("preset", [name for name in TWINS if name != "llama-7b"])
def test_the_other_presets_run(tmp_path, preset):
    """Catches a preset whose own config.json is refused, or whose model does not go through."""
    small = "--rounds 1 --simulations 2 --max-step-tokens 16 --max-depth 3 --max-tokens 128"
    printed = as_typed(preset, *small.split(), root=tmp_path)
    assert "4 trees" in printed and "2 unseen questions" in printed
