"""Low-rank adapters: the same function merged or not, trained alone, saved as PEFT reads them."""

import json
import shutil

import pytest
import torch
from conftest import redraw, tiny_config
from safetensors.torch import load_file
from test_ranks import kill_at, log, same, take_back, train, weights

from data import Tree, TreeNode
from model import (
    LORA_SCALE,
    Llama,
    LoRALinear,
    add_lora,
    merge_lora,
    save_lora,
    save_model,
    without_lora,
)
from support.plan import Lengths, training_memory
from svpo import Batch, LossConfig, learn, rescore
from train import RunConfig, TrainConfig, add_base_reference, shape_of, sizes_of

LORA = ["--lora-rank", "3"]


def trained(model: Llama) -> Llama:
    """Adapters as they might be after training."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_up, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_and_merged_weights_are_one_function(kind):
    """Catches a change that is merged with another scale, transposed, or only in some layers."""
    config = tiny_config(model_type=kind)
    model = redraw(Llama(config)).eval()
    token_BT = torch.arange(12).view(2, 6) % config.vocab_size
    logits_BTV, value_BT = model(token_BT)
    add_lora(model, 3)
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    assert len(layers) == 7 * config.num_hidden_layers
    assert torch.equal(model(token_BT)[0], logits_BTV)
    trained(model)
    changed_BTV = model(token_BT)[0]
    assert (changed_BTV - logits_BTV).abs().max() > 0.1
    with without_lora(model):
        assert torch.equal(model(token_BT)[0], logits_BTV)
    merged = Llama(config).eval()
    merged.load_state_dict(merge_lora(model.state_dict()))
    assert (merged(token_BT)[0] - changed_BTV).abs().max() < 1e-4
    one = layers[0]
    dense = one.weight + LORA_SCALE * one.lora_up @ one.lora_down
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, dense)


def test_only_adapters_and_the_value_head_are_trained():
    """Catches weights that are trained, though they are said to be frozen, or that cost memory."""
    model = add_lora(redraw(Llama(tiny_config())).bfloat16(), 3)
    names = {name for name, part in model.named_parameters() if part.requires_grad}
    assert all("lora_" in name or "value_head" in name for name in names) and len(names) > 2
    for name, part in model.named_parameters():
        assert part.dtype == (torch.float32 if name in names else torch.bfloat16), name
    _, value_BT = model(torch.zeros(1, 3, dtype=torch.long))
    value_BT.sum().backward()
    assert model.value_head.weight.grad.dtype == torch.float32


def test_peft_opens_the_adapters(tmp_path):
    """Catches names, a scale or a layout that PEFT reads differently."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = redraw(Llama(tiny_config())).eval()
    save_model(base, tmp_path / "base")
    model = trained(add_lora(base, 3))
    save_lora(model.state_dict(), tmp_path / "base", tmp_path / "adapter")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    token_BT = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert (twin(token_BT).logits - model(token_BT)[0]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    train(folder, *LORA)
    return folder


def test_a_run_with_adapters(tuned):
    """Catches a stage whose merged weights are not its base and its adapters, or that trains other
    weights; SFT and a round with every term of the loss."""
    for before, stage in (("start", "sft"), ("sft", "round1")):
        base, found = (weights(tuned, name) for name in (before, stage))
        adapter = load_file(tuned / "out" / stage / "adapter" / "adapter_model.safetensors")
        state = dict(base)
        for key, tensor in adapter.items():
            name = key.removeprefix("base_model.model.").removesuffix(".weight")
            state[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        merged = merge_lora(state)
        changed = [name for name in base if not torch.equal(base[name], found[name])]
        assert len(changed) >= 42 and all("_proj" in n or "value_head" in n for n in changed)
        for name in changed:
            assert "value_head" in name or (merged[name] - found[name]).abs().max() < 1e-6
        settings = json.loads((tuned / "out" / stage / "adapter/adapter_config.json").read_text())
        assert settings["r"] == 3 and settings["base_model_name_or_path"] == f"out/{before}"
    assert not (tuned / "out" / "round1" / "reference.safetensors").exists()
    first, *_, last = log(tuned, "round1")
    assert first["win_reward"] == first["lose_reward"] == 0 and last["win_reward"] != 0


def test_two_ranks_train_the_same_adapters(tuned, tmp_path):
    """Catches adapters that each rank draws or updates for itself, under FSDP."""
    shutil.copytree(tuned / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "round1" / "adapter")
    take_back(tmp_path, "round1")
    train(tmp_path, *LORA, ranks=2)
    same(weights(tmp_path, "round1"), weights(tuned, "round1"), 1e-5)


def test_a_killed_run_resumes_its_adapters(tuned, tmp_path):
    """Catches a checkpoint without the adapters, or their optimizer state."""
    kill_at(tmp_path, "round1", 3, *LORA)
    train(tmp_path, *LORA)
    same(weights(tmp_path, "round1"), weights(tuned, "round1"), 0)


@pytest.mark.parametrize("objective", ["grpo", "dpo", "dvo"])
def test_objectives_with_adapters(tmp_path, objective):
    """Catches an objective that does not see the adapters: GRPO samples from merged weights."""
    short = ["--valid-questions", "1", "--test-limit", "1"]
    train(tmp_path, *LORA, *short, "--objective", objective)
    found = load_file(tmp_path / "out" / "round1" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)


def test_the_reference_is_the_base():
    """Catches a reference that moves with the adapters."""
    win = TreeNode(0, [4, 5], [True, True], visit_count=1, q_value=1.0, reward=1.0, ending="eos")
    lose = TreeNode(0, [6], [True], visit_count=1, q_value=-1.0, reward=-1.0, ending="eos")
    tree = Tree("1", "q", "a", [TreeNode(-1, [1, 2, 3], [False] * 3, visit_count=2), win, lose])
    model = redraw(Llama(tiny_config())).eval()
    (wanted,) = rescore(model, [tree])
    trained(add_lora(model, 3))
    batch = Batch([learn(tree, LossConfig())], LossConfig())
    add_base_reference(model, batch)
    found = batch.ref_E[batch.needed_E].tolist()[1:]  # without the root, which has no tokens
    assert found == pytest.approx([node.logp for node in wanted.nodes[1:]], abs=1e-4)
    (moved,) = rescore(model, [tree])
    assert found != pytest.approx([node.logp for node in moved.nodes[1:]], abs=1e-2)


def test_one_card_of_24_gb_holds_7b_with_adapters():
    """Catches a plan that counts optimizer state for frozen weights, or none at all."""
    run = RunConfig(model="llama-7b", dtype="bfloat16")
    needed = {}
    for rank in (0, 16):
        train_config = TrainConfig(lora_rank=rank, recompute=True, tune_batch=1)
        sizes = sizes_of(shape_of(run), run, train_config)
        assert sizes.lora == bool(rank)
        parts = training_memory(sizes, Lengths(256, 256, 1800), 1, run, train_config)
        needed[rank] = sum(parts.values()) - parts["loading"]
    assert needed[0] > 110e9 and 14e9 < needed[16] < 0.9 * 24e9
