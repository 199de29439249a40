"""The plan of train.py --plan against what PyTorch stores and what a training step takes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, redraw, tiny_config

from data import RECIPES
from engine import TreeCache, context_of
from eval import AnswerConfig
from mcts import SearchConfig
from model import LOGITS, Llama, LlamaConfig, count_parameters, save_model
from support.flags import parse_args
from support.hugging_face import PRESETS
from support.memory import KEPT_FREE
from support.plan import Sizes, assumed_lengths, training_memory
from train import BENCHMARKS, RunConfig, TrainConfig, searches_of, shape_of

MEASURE = """
import json
import re
import sys

sys.path.insert(0, sys.argv[1])
import torch

from data import Tree, TreeNode
from model import load_model
from svpo import LossConfig, learn
from train import TrainConfig, backward

torch.set_num_threads(1)

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def step(tokens, recompute):
    for block in model.model.layers:
        block.recompute = recompute
    prompt = TreeNode(-1, [1] * 8, [False] * 8)
    solution = TreeNode(0, [2] * (tokens - 8), [True] * (tokens - 8))
    lesson = learn(Tree("t", "", "", [prompt, solution]), losses)
    backward(model, [(0, lesson)], losses, TrainConfig(), 0, 0)
    optimizer.step()
    optimizer.zero_grad()

losses = LossConfig("sft", sft_weight=1.0)
before = memory("VmRSS")
found = {}
model = load_model(sys.argv[2])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
step(16, False)
found["kept"] = memory("VmRSS")
for recompute in (True, False):
    open("/proc/self/clear_refs", "w").write("5")
    step(int(sys.argv[3]), recompute)
    found[str(recompute)] = memory("VmHWM") - before
print(json.dumps(found))
"""

WALK = """
import json
import sys
import weakref

sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import Llama, token_logp

class Memory(TorchDispatchMode):
    live = {}
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.live:
                    self.live[id(storage)] = weakref.ref(storage)
                    weakref.finalize(storage, self.live.pop, id(storage), None)
        storages = [reference() for reference in list(self.live.values())]
        self.most = max(self.most, sum(one.nbytes() for one in storages if one is not None))
        return result

    def peak(self):
        most, self.most = self.most, 0
        return most

torch.set_num_threads(1)
gpus, tokens = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
mesh = train.init_device_mesh("cpu", (gpus,))
train.init_device_mesh = lambda *shape: mesh
shape = train.shape_of(train.RunConfig(model="llama-7b"))
found = {}
with FakeTensorMode(), Memory() as memory:
    model = Llama(shape)
    train.shard(model, "bfloat16")
    found["loading"] = memory.peak()
    for block in model.model.layers:
        block.recompute = True
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad()
    token_BT = torch.zeros(1, tokens, dtype=torch.long)

    def read(hidden_BTD):
        hidden_XD = hidden_BTD[0]
        logp_X = token_logp(hidden_XD, model.output_weight(), token_BT[0])
        return logp_X.sum() + model.value(hidden_XD).sum()

    memory.peak()
    model(token_BT, read=read).backward()
    optimizer.step()
    found["training"] = memory.peak()
print(json.dumps(found))
"""


def sizes_of(config: LlamaConfig, width: int) -> Sizes:
    return Sizes(config, *count_parameters(config), width, LOGITS)


def test_presets_have_the_parameters_of_their_names():
    """Catches a wrong shape in the table."""
    billions = {
        "llama-7b": 6.738,
        "llama-2-7b": 6.738,
        "llama-3.1-8b": 8.030,
        "deepseekmath-7b": 6.910,
        "qwen2.5-math-1.5b": 1.544,
        "qwen2.5-math-7b": 7.616,
        "smollm2-135m": 0.1345,
        "smollm2-360m": 0.3618,
    }
    assert billions.keys() == PRESETS.keys()
    for name, wanted in billions.items():
        sizes = sizes_of(shape_of(RunConfig(model=name)), 2)
        assert sizes.parameters / 1e9 == pytest.approx(wanted, rel=1e-3)
        assert sizes.weights == 2 * sizes.parameters
        layers = sizes.config.num_hidden_layers
        assert 0.5 < layers * sizes.block_parameters / sizes.parameters < 1


def test_cache_and_activations_are_what_is_stored():
    """Catches a term that is missing: the tensors that autograd saves in one block, and the cache's
    memory, are counted."""
    config = tiny_config(hidden_size=64, intermediate_size=160, head_dim=16)
    sizes = sizes_of(config, 4)
    model = redraw(Llama(config))
    cache = TreeCache(config, 3, 40, 10)
    stored = cache.slots_L2BSGK.nbytes + cache.store_L2BSGK.nbytes
    assert sizes.cached_token() * 3 * 50 == stored
    cos, sin = model.rotary(torch.arange(48)[None], torch.float32)
    mask = torch.zeros(1, 1, 48, 48)
    inputs = (cos, sin, mask, *model.parameters())
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = []
    seen = {}

    def note(tensor):
        kept.append(tensor)  # or its address is used again
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model.layers[0](torch.randn(1, 48, 64, requires_grad=True), cos, sin, mask, None)
    stored = sum(size for address, size in seen.items() if address not in known) / 48
    assert 0.9 < stored / sizes.layer_activations() <= 1.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_training_step_takes_what_is_planned(tmp_path):
    """Catches a plan that is far from the memory that a step on a small model takes, with and
    without recomputation."""
    config = tiny_config(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
    )
    save_model(Llama(config).init_weights(0), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), str(tmp_path), "1500"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    sizes = sizes_of(config, 4)
    state = 16 * sizes.parameters
    for recompute in (True, False):
        planned = state + sizes.activations(1500, recompute)
        assert 0.75 < found[str(recompute)] * 2**20 / planned < 1.25, (found, planned / 2**20)


def test_the_plan_is_printed_without_weights(tmp_path):
    """Catches a plan that needs a download, and one that says that what does not fit fits."""

    def plan(*words):
        return subprocess.run(
            [sys.executable, ROOT / "train.py", "--plan", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout

    out = plan("--model=llama-7b")
    assert "6.74 B" in out
    assert "80 GB" not in out or "1 GPU: training" in out and "fits on 2, 4, 8, 64" in out
    assert "All phases fit" in plan()
    assert not list(tmp_path.iterdir())


def recipe() -> list:
    """The configurations of `train.py --model llama-7b` on a GPU."""
    words = ["--model", "llama-7b", "--plan"]
    kinds = (RunConfig, TrainConfig, SearchConfig, AnswerConfig)
    return parse_args("", kinds, words, recipes=(BENCHMARKS, *RECIPES))


def test_the_searches_of_the_7b_recipe_fit_into_80_gb():
    """Catches a search or a strategy of the table whose weights and cache, as tensors on the meta
    device, are more than an 80 GB GPU has, and rows that the plan does not count."""
    run, _, search, answering = recipe()
    shape = shape_of(run)
    sizes = sizes_of(shape, 2)
    free = 80e9 * (1 - KEPT_FREE) - sizes.weights
    context = context_of(shape, search)
    assert run.dtype == "bfloat16" and context == 2048
    for one in searches_of(shape, [512], search, answering):
        rows = one.rows(sizes, free, 0)
        cache = TreeCache(shape, rows, one.tokens, 0, "meta", torch.bfloat16)
        live = sizes.weights + cache.slots_L2BSGK.nbytes
        live += rows * one.lanes * shape.vocab_size * (2 + 16)  # logits, and what sampling holds
        assert 1 <= rows and live < 75e9, one.name


def test_loading_and_training_of_the_7b_recipe_fit_into_80_gb():
    """Catches a phase of which the tensors are more than the plan says: the 7B model is loaded,
    sharded over eight GPUs and trained for a step, as tensors without memory."""
    run, train, search, _ = recipe()
    sizes = sizes_of(shape_of(run), 2)
    lengths = assumed_lengths(run, search)
    share = train.tune_batch // 8 * lengths.training_tree
    planned = training_memory(sizes, lengths, 8, run, replace(train, pack_tokens=share))
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(ROOT), "8", str(share)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    loading = planned.pop("loading")
    training = sum(planned.values())
    assert 0.8 < found["loading"] / loading <= 1 and loading < 75e9
    assert 0.8 < found["training"] / training <= 1 and training < 75e9, (found, planned)
