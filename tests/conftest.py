"""Shared pieces of the tests: a small random model with redrawn weights, a tokenizer, helpers."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
LONG = bool(os.environ.get("SVPO_LONG"))  # have the hours-long part of some tests run, too
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

from data import StepTokenizer
from model import Llama, LlamaConfig, save_model
from tasks.built_in import task_tokenizer

torch.set_num_threads(1)
TINY = {
    "vocab_size": 19,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def redraw(module: torch.nn.Module, seed: int = 0, std: float = 0.2):
    """Weights that make mistakes visible: normal(0, std), norms 1 + 0.2 randn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else std * noise)
    return module


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{**TINY, **changes})


@pytest.fixture
def tokenizer() -> StepTokenizer:
    return StepTokenizer(task_tokenizer("arithmetic"), [0])


@pytest.fixture
def model(tokenizer) -> Llama:
    """Random weights, calm enough that steps end now and then and logits are not saturated."""
    config = tiny_config(vocab_size=tokenizer.tokenizer.get_vocab_size())
    return redraw(Llama(config), std=0.1).eval()


@pytest.fixture
def model_folder(tmp_path, model, tokenizer) -> Path:
    """Without checksums, because tests change its files."""
    save_model(model, tmp_path / "model")
    tokenizer.tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "checksums.json").unlink()
    return tmp_path / "model"
