"""The network against Hugging Face's, the tree mask, strict loading, and the value head."""

import json
import math
import os
import shutil
from itertools import product

import pytest
import torch
import torch.nn as nn
from conftest import redraw, tiny_config
from safetensors.torch import load_file, save_file
from test_mcts import CONFIG, QUESTIONS
from torch.utils.checkpoint import checkpoint

from mcts import search_trees
from model import (
    Llama,
    count_parameters,
    fresh_value_head,
    load_model,
    save_model,
    tree_mask,
)
from support.flags import InputError
from svpo import rescore

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TWIN = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TWINS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama 3": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "mistral": {"sliding_window": 100, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("family", TWINS)
def test_logits_equal_hugging_face(tmp_path, family):
    """Catches wrong rotary pairing or scaling, head order, group order, norm weights, biases or
    tying, in loading and in the forward pass; and a saved folder that Hugging Face reads as another
    model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = family.split(",")[0].split(" ")[0]
    config = AutoConfig.for_model(kind, **{**TWIN, **TWINS[family]})
    twin = redraw(AutoModelForCausalLM.from_config(config)).eval()
    twin.save_pretrained(tmp_path / "theirs")
    token_BT = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = load_model(tmp_path / "theirs")
        logits_BTV, value_BT = model(token_BT)
        torch.testing.assert_close(logits_BTV, twin(token_BT).logits, atol=1e-4, rtol=0)
        save_model(model, tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert type(again) is type(twin)
        torch.testing.assert_close(again(token_BT).logits, logits_BTV, atol=1e-4, rtol=0)
        assert torch.equal(load_model(tmp_path / "ours")(token_BT)[0], logits_BTV)
    assert value_BT.shape == token_BT.shape and value_BT.abs().max() < 1
    assert model.config.max_position_embeddings == (100 if family == "mistral" else 128)


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "sliding_window",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types",
        ),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_would_change_the_computation_is_refused(model_folder, changes, name):
    """Catches checkpoints that load and compute something else."""
    edit_config(model_folder, **changes)
    with pytest.raises(InputError, match=name):
        load_model(model_folder)


def test_shards_load_as_one_file(tmp_path, model_folder, model):
    """Catches an index that is not followed, or a shard that is left out."""
    tensors = load_file(model_folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model_folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_folder / "model.safetensors").unlink()
    loaded = load_model(model_folder).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    (model_folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(InputError, match="weight_map"):
        load_model(model_folder)
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match="b.safetensors: no such file"):
        load_model(model_folder)


def test_tree_mask_by_hand():
    """Catches siblings or packed documents that see each other, and ancestors that are not seen."""
    #      root root | a  a | b (child of a) | c (sibling of a) || second tree | padding
    end = [6, 6, 5, 5, 5, 6, 7, 8]
    seen = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 5}, {6}, {7}]
    mask_TT = tree_mask(torch.tensor([end]))[0, 0]
    assert [set(row.nonzero().flatten().tolist()) for row in mask_TT] == seen


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "4 query heads"),
        ({"hidden_size": -4}, "positive"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"hidden_size": 48}, "has shape"),
        ({"num_hidden_layers": 3}, "missing tensor"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
    ],
)
def test_unsupported_configs_are_refused_by_name(model_folder, changes, message):
    """Catches a checkpoint that loads and computes something else than it was trained for."""
    edit_config(model_folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(model_folder)


def test_broken_folders_are_refused(tmp_path, model_folder):
    """Catches tracebacks, and half-loaded models, where files are missing or damaged."""
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "absent")
    for name, damage, message in (
        ("config.json", lambda path: path.unlink(), "no such file"),
        ("config.json", lambda path: path.write_text("{"), "not valid JSON"),
        ("config.json", lambda path: path.write_text("[]"), "JSON object"),
        ("model.safetensors", lambda path: os.truncate(path, 100), "safetensors"),
        ("value_head.safetensors", lambda path: path.write_bytes(b"x"), "safetensors"),
    ):
        shutil.copytree(model_folder, tmp_path / "broken")
        damage(tmp_path / "broken" / name)
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")


def test_only_the_value_head_may_be_missing(model_folder):
    """Catches a loader that needs a value head, or one that starts it with a bias."""
    (model_folder / "value_head.safetensors").unlink()
    model = load_model(model_folder, seed=3)
    assert model.value_head.bias.item() == 0 and model.value_head.weight.std() > 0
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_recomputed_blocks_have_the_same_gradients(model, monkeypatch):
    """Catches a switch without effect, and a recomputation that is not the same computation."""
    calls = []
    real = checkpoint

    def counted(*inputs, **more):
        calls.append(1)
        return real(*inputs, **more)

    monkeypatch.setattr("model.checkpoint", counted)
    token_BT = torch.randint(0, 15, (2, 12))
    gradients = []
    for recompute in (False, True):
        for block in model.model.layers:
            block.recompute = recompute
        logits_BTV, value_BT = model(token_BT)
        loss = logits_BTV.square().mean() + value_BT.sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert len(calls) == (len(model.model.layers) if recompute else 0)
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
    with torch.no_grad():
        model(token_BT)
    assert len(calls) == len(model.model.layers)


# --------------------------------------------------------------------------------- the value head


def test_a_fresh_value_head():
    """Catches a head whose V is not about 0 on real hidden states (AlphaMath's spread, without the
    division), one that starts with a bias, and one that does not depend on the seed."""
    with torch.device("meta"):
        model = Llama(tiny_config(hidden_size=4096, initializer_range=0.05))
    head = fresh_value_head(model, 3)
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "value_head.weight": (1, 4096),
        "value_head.bias": (1,),
    }
    weight = head["value_head.weight"]
    assert weight.std().item() == pytest.approx(0.05 / math.sqrt(4096), rel=0.05)
    assert abs(weight.mean().item()) < 4 * 0.05 / 4096
    assert head["value_head.bias"].item() == 0
    assert torch.equal(weight, fresh_value_head(model, 3)["value_head.weight"])
    assert not torch.equal(weight, fresh_value_head(model, 4)["value_head.weight"])


class TwoLayers(nn.Module):
    """A value head of another kind, with the signature of model.ValueHead."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 300)
        self.outer = nn.Linear(300, 1)

    def forward(self, hidden):
        return torch.tanh(self.outer(self.inner(hidden).relu()).squeeze(-1).float())


LAYERS = ("inner", "outer")
KINDS = ("weight", "bias")


def test_another_value_head(tmp_path, tokenizer, monkeypatch):
    """Catches a model that only draws, counts, saves, loads or searches with the head that it comes
    with: another one is assigned to model.ValueHead, and nothing else changes."""
    before, *_ = count_parameters(tiny_config())
    monkeypatch.setattr("model.ValueHead", TwoLayers)
    after, *_ = count_parameters(tiny_config())
    assert after - before == (32 * 300 + 300 + 300 + 1) - 33
    config = tiny_config(vocab_size=tokenizer.tokenizer.get_vocab_size(), initializer_range=0.3)
    model = Llama(config).init_weights(1).eval()
    head = {name: value for name, value in model.named_parameters() if "value_head" in name}
    names = [f"value_head.{layer}.{kind}" for layer, kind in product(LAYERS, KINDS)]
    assert list(head) == names
    for layer in LAYERS:  # drawn
        std = head[f"value_head.{layer}.weight"].std().item()
        assert std == pytest.approx(0.3, rel=0.15)
        assert not head[f"value_head.{layer}.bias"].any()
    redraw(model.value_head, std=0.3)  # biases, too
    save_model(model, tmp_path)
    assert sorted(load_file(tmp_path / "value_head.safetensors")) == sorted(names)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.value_head, TwoLayers)
    token_BT = torch.randint(0, 15, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        value_BT = model(token_BT)[1]
        assert torch.equal(loaded(token_BT)[1], value_BT) and value_BT.std() > 0.01
    trees = list(search_trees(loaded, tokenizer, QUESTIONS[:2], CONFIG))
    for tree, again in zip(trees, rescore(loaded, trees)):
        values = [node.value for node in again.nodes]
        assert [node.value for node in tree.nodes] == pytest.approx(values, abs=1e-4)
    (tmp_path / "value_head.safetensors").unlink()
    fresh = load_model(tmp_path, seed=2).value_head  # a checkpoint that comes without one
    for layer in (fresh.inner, fresh.outer):
        assert layer.weight.std().item() == pytest.approx(0.3 / math.sqrt(32), rel=0.15)
        assert not layer.bias.any() and not layer.bias.is_meta
    monkeypatch.undo()
    save_model(model, tmp_path)
    with pytest.raises(InputError, match="missing tensor value_head.bias"):
        load_model(tmp_path)
