"""What a GPU needs, checked without one: devices, blocks of the mask, compilation, CUDA graphs.

`Gpu` pretends that there is one. Its tensors have their numbers on the CPU and say that they are on
cuda:0, so results can be compared. What a real GPU refuses, it refuses: operations on tensors of
two devices, and reading a number while a graph is captured. A graph is a list of calls that is made
again. Kernels, streams and memory are not checked.
"""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import redraw
from test_mcts import QUESTIONS
from test_svpo import searched
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import model as network
from data import SourceConfig
from engine import Engine, load_source
from mcts import SearchConfig, search_trees
from model import TILE, Llama, block_mask, flex, load_model, save_model, tree_mask
from support.graphs import Graphed
from support.ranks import use_device
from svpo import LossConfig, add_reference, learn, rescore
from train import TrainConfig, backward, clip_gradients

CUDA = torch.device("cuda", 0)
LENGTHS = (1, 7, 128, 130, 300, 513)
SEARCH = SearchConfig(
    simulations=6, expand_width=3, max_depth=4, max_step_tokens=6, search_rows=3, cache_tokens=3000
)
READS = {
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.nonzero,
}


# ------------------------------------------------------------------------------- the pretended GPU


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)


def on_gpu(result):
    """The same numbers, on the GPU, whatever holds them."""
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        moved = [on_gpu(item) for item in result]
        named = isinstance(result, tuple) and hasattr(result, "_fields")
        return type(result)(*moved) if named else type(result)(moved)
    if isinstance(result, torch.Tensor) and not isinstance(result, OnGpu):
        return result.as_subclass(OnGpu)
    return result


class Gpu(TorchFunctionMode):
    """The rules of a GPU for every call of torch; `tape` holds the calls of a capture."""

    def __init__(self):
        super().__init__()
        self.tape = None
        self.replays = 0
        self.current = "cuda:0"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self.move(func, *args, **kwargs)
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        ours = [item for item in tensors if isinstance(item, OnGpu)]
        others = [item for item in tensors if not isinstance(item, OnGpu) and item.dim()]
        in_vmap = any(map(torch._C._functorch.is_functorch_wrapped_tensor, others))
        if ours and others and func is not torch.Tensor.copy_ and not in_vmap:
            raise RuntimeError(f"{func.__name__}: tensors on two devices")
        if ours and self.tape is not None and func in READS:
            raise RuntimeError(f"{func.__name__}: a read during capture")
        if ours and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        to_gpu = bool(ours)
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu") if to_gpu else kwargs["device"]
        result = func(*args, **kwargs)
        result = on_gpu(result) if to_gpu else result
        if self.tape is not None:
            self.tape.append((func, args, kwargs, result))
        return result

    def move(self, func, tensor, *words, **kwargs):
        """Tensor.to and Tensor.cpu; what changes its device is copied."""
        devices = [word for word in words if isinstance(word, (str, torch.device))]
        asked = kwargs.pop("device", None) or (devices or [None])[0]
        if func is torch.Tensor.cpu:
            asked = "cpu"
        to_gpu = isinstance(tensor, OnGpu)
        if asked is not None:
            to_gpu = torch.device(asked).type == "cuda"
        words = [word for word in words if word not in devices]
        if to_gpu != isinstance(tensor, OnGpu):
            if self.tape is not None:
                raise RuntimeError("a copy between devices during capture")
            tensor = tensor.clone()
        result = torch.Tensor.to(tensor, *words, **kwargs) if words or kwargs else tensor
        return on_gpu(result) if to_gpu else result.as_subclass(torch.Tensor)

    @contextlib.contextmanager
    def capture(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert self.tape is None and stream is not None
        self.tape = []
        try:
            yield
        finally:
            graph.calls, self.tape = self.tape, None

    def replay(self, graph):
        """Make a graph's calls again, and put each result where it was when it was captured."""
        self.replays += 1
        for func, args, kwargs, result in graph.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    with torch._C.DisableTorchFunction():
                        old.copy_(new)

    @contextlib.contextmanager
    def on(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU, of which tensors on `CUDA` are."""
    mode = Gpu()

    def new_graph():
        assert mode.current == "cuda:0", "captured on another device"
        graph = SimpleNamespace(pool=lambda: "pool")
        graph.replay = lambda: mode.replay(graph)
        return graph

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", mode.on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", mode.capture)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(network, "flex", lambda: dense_flex)
    with mode:
        yield mode


def blocks(count_B1R, index_B1RC):
    """A list of blocks as a matrix (B, R, C)."""
    place_C = torch.arange(index_B1RC.shape[-1], device=index_B1RC.device)
    chosen_B1RC = place_C < count_B1R[..., None]
    return torch.zeros_like(chosen_B1RC).scatter(-1, index_B1RC.long(), chosen_B1RC)[:, 0]


def seen_tokens(mask):
    """Which tokens each token sees (B, T, T): whole blocks, and what is seen of others."""
    rows, _, length, _ = mask.shape
    device = mask.kv_indices.device
    some, whole = (
        matrix.repeat_interleave(TILE, -1).repeat_interleave(TILE, -2)[:, :length, :length]
        for matrix in (
            blocks(mask.kv_num_blocks, mask.kv_indices),
            blocks(mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    index_T = torch.arange(length, device=device)
    row_B11 = torch.arange(rows, device=device)[:, None, None]
    return whole | some & mask.mask_mod(row_B11, 0, index_T[:, None], index_T)


def dense_flex(query, key, value, block_mask, enable_gqa):
    """flex_attention with a backward pass that runs anywhere."""
    assert query.shape[2] == block_mask.shape[3] and query.shape[2] % TILE == 0
    mask_B1TT = seen_tokens(block_mask)[:, None]
    return F.scaled_dot_product_attention(query, key, value, mask_B1TT, enable_gqa=enable_gqa)


def copy_of(model, device="cpu") -> Llama:
    """A copy with the same weights."""
    with torch.device("meta"):
        copy = Llama(model.config)
    state = {name: p.detach().clone().to(device) for name, p in model.named_parameters()}
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(True).eval()


# ---------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "asked, wanted", [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_the_current_device(asked, wanted, monkeypatch, model_folder):
    """Catches a command that computes on a device that is not the current one, and a rank that
    takes another's device or not the one that is asked for."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(engine, "load_model", lambda folder, device, *_: device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    source = SourceConfig(model=str(model_folder), data="arithmetic", device=asked, limit=2)
    assert use_device(source) == load_source(source, 0, "test")[0] == wanted
    assert current == ([wanted] * 2 if wanted != "cpu" else [])


def test_mixed_devices_are_refused(gpu):
    """Catches a pretended GPU that lets everything pass, so that the tests below prove nothing."""
    ours = torch.ones(3, device=CUDA)
    index = torch.tensor([0, 2])
    assert ours.is_cuda and (ours + ours)[1:].device == CUDA and not ours.cpu().is_cuda
    assert (ours * torch.tensor(2.0)).tolist() == [2, 2, 2]  # numbers may come from the CPU
    for mixed in (
        lambda: ours + torch.ones(3),
        lambda: torch.ones(3)[index.to(CUDA)],
        lambda: torch.cat([ours, torch.ones(3)]),
        lambda: F.linear(torch.ones(2, 3), ours[None]),
        lambda: torch.zeros(3).index_add(0, index, ours[:2]),
        lambda: torch.stack([torch.zeros(3), ours]),
    ):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        ours.numpy()


def test_search_on_a_gpu(gpu, model, tokenizer, monkeypatch):
    """Catches mixed devices in a search, graphs that read a number or take another's inputs, and
    trees that differ from those of the CPU."""
    wanted = {tree.id: tree for tree in search_trees(model, tokenizer, QUESTIONS, SEARCH)}
    assert gpu.replays == 0
    found = {}
    for tree in search_trees(copy_of(model, CUDA), tokenizer, QUESTIONS, SEARCH):
        found[tree.id] = tree
    assert gpu.replays > 20 and found.keys() == wanted.keys()
    for name, tree in found.items():
        others = wanted[name].nodes
        assert [node.tokens for node in tree.nodes] == [node.tokens for node in others]
        values = [node.value for node in others]
        assert [node.value for node in tree.nodes] == pytest.approx(values, abs=1e-4)
    monkeypatch.setattr(Engine, "to_device", lambda self, array: torch.from_numpy(array))
    with pytest.raises(RuntimeError, match="two devices"):
        list(search_trees(copy_of(model, CUDA), tokenizer, QUESTIONS, SEARCH))


def one_step(model, lessons):
    """The figures and the weights of an optimizer step."""
    train = TrainConfig(pack_tokens=200)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    figures, _ = backward(model, list(enumerate(lessons)), LossConfig(), train, 0, 0)
    figures["grad_norm"] = clip_gradients(model, 1.0)
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    optimizer.step()
    return figures, gradients


def test_training_on_a_gpu(gpu, model, tokenizer, monkeypatch):
    """Catches mixed devices from the lessons to the optimizer, a block mask that is not the tree
    mask, and gradients that differ from those of the CPU."""
    lessons = [learn(tree, LossConfig()) for tree in searched(model, tokenizer)]
    assert sum(len(lesson.pairs) for lesson in lessons) > 3
    redraw(model, 1, std=0.1)  # another policy than that of the trees
    wanted, gradients = one_step(copy_of(model), lessons)
    ours = copy_of(model, CUDA)
    found, same = one_step(ours, lessons)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert all(parameter.is_cuda for parameter in ours.parameters())
    moved = Llama.value
    monkeypatch.setattr(Llama, "value", lambda self, x, dropout=None: moved(self, x, dropout.cpu()))
    with pytest.raises(RuntimeError, match="two devices"):
        one_step(copy_of(model, CUDA), lessons)


def test_scores_and_files_of_a_gpu(gpu, model, tokenizer, tmp_path):
    """Catches mixed devices in what is computed beside training: scores, the reference and its
    fingerprints, files; and loading that leaves tensors on the CPU."""
    trees = searched(model, tokenizer)
    ours = copy_of(model, CUDA)
    for one, other in zip(rescore(ours, trees, 200), rescore(model, trees)):
        for name in ("logp", "value"):
            values = [getattr(node, name) for node in other.nodes]
            assert [getattr(node, name) for node in one.nodes] == pytest.approx(values, abs=1e-4)
    lessons = [learn(tree, LossConfig()) for tree in trees]
    add_reference(ours, lessons, tmp_path / "reference")
    add_reference(model, lessons, tmp_path / "reference")  # the same fingerprints
    save_model(ours, tmp_path / "model")
    again = load_model(tmp_path / "model", CUDA)
    for name, parameter in again.named_parameters():
        assert parameter.is_cuda and torch.equal(parameter.cpu(), model.get_parameter(name)), name


def test_graphs_replay_what_was_captured(gpu):
    """Catches a state that is not put back after warming up, inputs that a replay does not see,
    graphs of different shapes that are mixed up, and reads that a capture forbids."""
    state = torch.zeros(3, device=CUDA)

    def add(index, value):
        state[index] += value
        return state.clone()

    graphed = Graphed(add, state)
    wanted = torch.zeros(3)
    for index, value in (([0, 1], 1.0), ([1, 2], 2.0), ([2], 3.0), ([0, 2], 4.0), ([1], 5.0)):
        wanted[index] += value
        values = torch.full((len(index),), value)
        with gpu.on("cuda:1"):
            found = graphed(torch.tensor(index).to(CUDA), values.to(CUDA))
        assert torch.equal(found.cpu(), wanted)
    assert gpu.replays == 5 and len(graphed.graphs) == 2
    for reading in (lambda tensor: tensor.sum().item(), lambda tensor: tensor.cpu()):
        with pytest.raises(RuntimeError, match="during capture"):
            Graphed(reading)(torch.ones(2, device=CUDA))


# --------------------------------------------------------------------------------- the block mask


def random_ends(rng: random.Random, length: int) -> list[int]:
    """Where the subtree of each token of a random forest ends."""
    ends = [0] * length
    gaps = [(0, length)]
    while gaps:
        begin, end = gaps.pop()
        if begin == end:
            continue
        edge = rng.randint(begin, end) // TILE * TILE + rng.randint(-1, 1)  # near a block's
        size = (
            rng.choice((end, rng.randint(begin + 1, end), min(end, max(begin + 1, edge)))) - begin
        )
        step = rng.randint(1, rng.choice((size, min(size, 5))))
        ends[begin : begin + step] = [begin + size] * step
        gaps += [(begin + step, begin + size), (begin + size, end)]
    return ends


def ends_of(seed: int, rows: int, length: int):
    rng = random.Random(seed)
    return torch.tensor([random_ends(rng, length) for _ in range(rows)])


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_hide_and_show_nothing_else(length):
    """Catches a block that hides a pair of tokens or shows one, and blocks that are read in vain:
    against the dense mask, and against what flex_attention makes of the same function."""
    whole = 0
    for seed in range(40):
        end_BT = ends_of(seed, 1 + seed % 3, length)
        mask = block_mask(end_BT)
        assert mask.shape == (len(end_BT), 1, length, length)
        assert torch.equal(seen_tokens(mask), tree_mask(end_BT)[:, 0])
        other = create_block_mask(mask.mask_mod, len(end_BT), None, length, length, device="cpu")
        for name in ("kv", "q", "full_kv", "full_q"):
            pairs = []
            for one in (mask, other):
                count, index = getattr(one, f"{name}_num_blocks"), getattr(one, f"{name}_indices")
                assert count.dtype == index.dtype == torch.int32 and index.is_contiguous()
                pairs.append(blocks(count, index))
            assert torch.equal(*pairs), (name, seed)
        whole += int(mask.full_kv_num_blocks.sum())
    assert (whole > 0) == (length >= 300)


@pytest.mark.parametrize("length", (7, 300))
def test_attention_by_blocks(length):
    """Catches a block mask that flex_attention does not take as it is meant."""
    torch.manual_seed(0)
    end_BT = ends_of(1, 2, length)
    query, key, value = torch.randn(3, 2, 4, length, 16)
    found = flex_attention(query, key[:, :2], value[:, :2], None, block_mask(end_BT), None, True)
    wanted = F.scaled_dot_product_attention(
        query, key[:, :2], value[:, :2], tree_mask(end_BT), enable_gqa=True
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [item.numel() for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_long_rows_have_no_square():
    """Catches a block mask that is computed from the mask of all pairs of tokens."""
    rows, length = 2, 60_000
    end_BT = ends_of(0, rows, length)
    with Largest() as largest:
        block_mask(end_BT)
    tiles = -(-length // TILE)
    assert tiles**2 <= largest.numel <= max(rows * tiles * (tiles + 1), rows * (length + TILE))


# ------------------------------------------------------------------------------------ compilation


def test_one_kernel_for_all_lengths(monkeypatch):
    """Catches a kernel for each length, and a limit of kernels behind which attention falls back,
    without an error, to code that holds all scores."""
    config = torch._dynamo.config
    before = config.recompile_limit
    compiled, graphs = torch.compile, []

    def kernel(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    flex.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "compile", lambda *args, **kw: compiled(*args, backend=kernel, **kw))
        attention = flex()
    assert flex() is attention and config.recompile_limit >= 64

    def attend(rows, length):
        query = torch.zeros(rows, 1, length, 16)
        return attention(query, query, query, block_mask=block_mask(ends_of(0, rows, length)))

    try:
        with torch.no_grad():
            for rows in (2, 3, 1, 4):
                for length in (256, 128, 640, 384, 512, 1280):
                    attend(rows, length)
            assert len(graphs) <= 6  # one, several, as many rows as blocks
            config.recompile_limit = len(graphs)
            with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                attention(*torch.zeros(3, 2, 2, 256, 16), block_mask=block_mask(ends_of(0, 2, 256)))
    finally:
        config.recompile_limit = before
        flex.cache_clear()
        torch._dynamo.reset()
