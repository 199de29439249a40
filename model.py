"""LLaMA with a value head: the network, the tree mask, loading and saving.

Module and parameter names equal those of Hugging Face's `LlamaForCausalLM`, so that checkpoints
load without conversion. One forward pass returns both heads: next-token logits, and the value V in
(-1, 1) of the partial solution that ends at each token (AlphaMath section 3: linear and tanh on the
hidden state of the last token).

With a cache (engine.TreeCache) the tokens of many partial solutions are fed as one flat line, and
only `Attention` sees the rows of the cache. Skip `cache` at a first reading.

Dimension key: B rows (of a batch, or of a cache; 1 for a flat line), T tokens, N columns of a
cache's row, S tokens that may be seen (cached and new), M tokens to score, D width, V vocabulary,
H query heads, G key/value heads, Q queries of a key (of a block, of all heads that share it),
K head width, J pairs of its dimensions (K / 2), R blocks of queries, C blocks of keys, X tokens of
a block or of a flat line, P tokens of a prefix, L layers.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from support.config_json import FAMILIES, REQUIRED, parse_config
from support.files import check_files, publish, write_checksums, write_json
from support.flags import InputError
from support.hugging_face import (
    HEAD,
    INDEX,
    WEIGHTS,
    check_tensors,
    copied_files,
    find_folder,
    match_names,
    read_tensors,
)

LOGITS = 2**24  # logits computed at once while training: 64 MB in float32
LORA_SCALE = 2  # of the adapters' change: alpha / rank
TILE = 128  # tokens of a block of flex_attention
QUERIES = 128  # tokens of a block of a PathMask
GATHERED = 3  # keys that a PathMask gathers for each token; more are not kept for the backward pass


@dataclass
class LlamaConfig:
    """The fields of a Hugging Face config.json that change the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # qwen2: q, k and v have biases; qwen3: q and k are normalised
    rope_scaling: dict | None = None  # LLaMA 3.1's


class PathMask(NamedTuple):
    """Who sees whom in a line of tokens, by blocks of queries (see `path_mask`)."""

    key_X: Tensor  # indices of the keys of each block, block after block
    # (Q, S) of each block: True where the query may look at the key, or additive
    seen: list[Tensor]
    keep: bool = False  # the gathered keys for the backward pass; else they are gathered again


# -------------------------------------------------------------------------------------- the network


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's layout: dimension i is paired with i + K/2."""
    low, high = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos_BT1K + torch.cat((-high, low), dim=-1) * sin_BT1K


@functools.cache
def flex():
    """flex_attention, compiled where there is a kernel for it.

    One kernel serves all lengths. Past the limit of kernels, `fullgraph` makes it an error to fall
    back to the code without a kernel, which holds all scores at once.
    """
    if not torch.cuda.is_available():
        return flex_attention
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, index: int):
        super().__init__()
        self.index = index  # of the layer, by which a cache knows it
        self.heads = c.num_attention_heads
        self.groups = c.num_key_value_heads
        self.head_dim = c.head_dim
        bias = c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, self.groups * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, self.groups * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        normed = c.model_type == "qwen3"
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if normed else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | PathMask | None,
        cache,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = self.q_proj(x_BTD).view(B, T, self.heads, self.head_dim)
        k_BTGK = self.k_proj(x_BTD).view(B, T, self.groups, self.head_dim)
        v_BTGK = self.v_proj(x_BTD).view(B, T, self.groups, self.head_dim)
        out_BTHK = self.attend_new(q_BTHK, k_BTGK, v_BTGK, cos, sin, mask, cache)
        return self.o_proj(out_BTHK.reshape(B, T, -1))

    def attend_new(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cos: Tensor, sin: Tensor, mask, cache
    ) -> Tensor:
        """Rotate queries and keys, and attend (B, T, H, K): among themselves, or to a cache."""
        q_BTHK = rotate(self.q_norm(q_BTHK), cos, sin)
        k_BTGK = rotate(self.k_norm(k_BTGK), cos, sin)
        if cache is None:
            return self.attend(q_BTHK, k_BTGK, v_BTGK, mask)
        return self.attend_cached(q_BTHK, k_BTGK, v_BTGK, mask, cache)

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask) -> Tensor:
        """Attention of tokens among themselves (B, T, H, K); plain causal without a mask."""
        if isinstance(mask, PathMask):
            inputs = (q_BTHK, k_BTGK, v_BTGK, mask)
            if mask.keep:
                return attend_paths(*inputs)
            return checkpoint(attend_paths, *inputs, use_reentrant=False)
        q_BHTK = q_BTHK.transpose(1, 2)
        k_BGTK = k_BTGK.transpose(1, 2)
        v_BGTK = v_BTGK.transpose(1, 2)
        shared = self.heads != self.groups
        if isinstance(mask, BlockMask):
            attended = flex()(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=shared)
        else:
            attended = F.scaled_dot_product_attention(
                q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
            )
        return attended.transpose(1, 2)

    def attend_cached(
        self, q_1XHK: Tensor, k_1XGK: Tensor, v_1XGK: Tensor, mask: Tensor, cache
    ) -> Tensor:
        """Attention of a flat line of new tokens to the rows of a cache (1, X, H, K).

        The prefix that all rows share, if the cache holds one, is read once for all of them. The
        two results are weighed by their shares of the softmax's sum.
        """
        q_BNHK, k_BSGK, v_BSGK = cache.unroll(self.index, q_1XHK, k_1XGK, v_1XGK)
        if cache.prefix_L2PGK is None:
            return cache.roll_up(self.attend_keys(q_BNHK, k_BSGK, v_BSGK, mask)[0])
        rows_BNHK, rows_BNH = self.attend_keys(q_BNHK, k_BSGK, v_BSGK, mask, logs=True)
        k_1PGK, v_1PGK = cache.prefix_L2PGK[self.index][:, None]
        prefix_1XHK, prefix_1XH = self.attend_keys(q_1XHK, k_1PGK, v_1PGK, None, logs=True)
        share_1XH = torch.sigmoid(cache.roll_up(rows_BNH) - prefix_1XH).to(q_1XHK.dtype)
        return torch.lerp(prefix_1XHK, cache.roll_up(rows_BNHK), share_1XH[..., None])

    def attend_keys(
        self, q_BNHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None, logs=False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries to keys of the same row (B, N, H, K).

        With `logs` (on CPUs) also the logarithm of the softmax's sum (B, N, H). The heads that
        share a key stand in line as further queries of that key, so that keys are read once, not
        once per head. `mask` (B, 1, Q, S) is laid out for that (`Llama.hidden`).
        """
        q_BHNK = q_BNHK.transpose(1, 2)
        q_BGQK = q_BHNK.reshape(q_BHNK.shape[0], self.groups, -1, self.head_dim)
        k_BGSK = k_BSGK.transpose(1, 2)
        v_BGSK = v_BSGK.transpose(1, 2)
        log_BNH = None
        if logs:  # the public function keeps them to itself (requirements.txt bounds torch)
            attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out_BGQK, log_BGQ = attention(q_BGQK, k_BGSK, v_BGSK, attn_mask=mask)
            log_BNH = log_BGQ.reshape(q_BHNK.shape[:3]).transpose(1, 2)
        else:
            out_BGQK = F.scaled_dot_product_attention(q_BGQK, k_BGSK, v_BGSK, attn_mask=mask)
        return out_BGQK.reshape(q_BHNK.shape).transpose(1, 2), log_BNH


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.recompute = False  # keep only the block's input for the backward pass

    def forward(self, *inputs) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.block, *inputs, use_reentrant=False)
        return self.block(*inputs)

    def block(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask, cache) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part that Hugging Face names `model`."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, index) for index in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class ValueHead(nn.Linear):
    """V in (-1, 1), float32, of the partial solution that ends at each hidden state (..., D).

    Linear and tanh (AlphaMath section 3; the official code puts dropout before them, see
    `Llama.value`). Another head only needs the same signature: it is saved, loaded and drawn as
    this one is.
    """

    def __init__(self, width: int):
        super().__init__(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(super().forward(hidden).squeeze(-1).float())


class Llama(nn.Module):
    """Decoder-only transformer with a language-model head (tied or not) and a value head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = ValueHead(config.hidden_size)

    def init_weights(self, seed: int = 0) -> "Llama":
        """Draw fresh weights: normal(0, initializer_range), residual outputs scaled down by depth
        as in GPT-2, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter_std = residual_std if residual else std
                nn.init.normal_(parameter, 0.0, parameter_std, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        return self

    def hidden(
        self,
        token_BT: Tensor,
        position_BT: Tensor | None = None,
        mask: Tensor | BlockMask | PathMask | None = None,
        cache=None,
    ) -> Tensor:
        """Final hidden states (B, T, D); both heads are functions of them.

        `mask` (B, 1, T, T) is True where a query may look, or a BlockMask, or for one row a
        PathMask; None is plain causal.
        With a `cache` (engine.TreeCache) the tokens are one flat line of B = 1, and `mask`
        (B, 1, N, S) is needed.
        """
        if position_BT is None:
            position_T = torch.arange(token_BT.shape[1], device=token_BT.device)
            position_BT = position_T.expand_as(token_BT)
        x_BTD = self.model.embed_tokens(token_BT)
        cos, sin = self.rotary(position_BT, x_BTD.dtype)
        # queries of a key, where the heads that share it stand in line
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        if isinstance(mask, Tensor):
            mask = additive(mask, x_BTD.dtype)
        if isinstance(mask, PathMask):
            seen = [additive(seen_QS, x_BTD.dtype).repeat(shared, 1) for seen_QS in mask.seen]
            # blocks that are recomputed as a whole need not gather a third time
            keep = self.model.layers[0].recompute or len(mask.key_X) <= GATHERED * x_BTD.shape[1]
            mask = mask._replace(seen=seen, keep=keep)
        if cache is not None:
            mask = mask.repeat(1, 1, shared, 1)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos, sin, mask, cache)
        return self.model.norm(x_BTD)

    def rotary(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, 1, K) of the rotary angles, from positions in float32.

        They are computed anew, so that there is no buffer to lose on the meta device.
        """
        width = self.config.head_dim
        exponent_J = torch.arange(0, width, 2, device=position_BT.device).float() / width
        frequency_J = self.config.rope_theta**-exponent_J
        scaling = self.config.rope_scaling
        if scaling:  # long waves are stretched, short ones are not (LLaMA 3.1)
            length = scaling["original_max_position_embeddings"]
            turns_J = length * frequency_J / (2 * math.pi)
            low = scaling["low_freq_factor"]
            high = scaling["high_freq_factor"]
            kept_J = ((turns_J - low) / (high - low)).clamp(0, 1)
            frequency_J = kept_J * frequency_J + (1 - kept_J) * frequency_J / scaling["factor"]
        angle_BT1K = (position_BT[..., None].float() * frequency_J).repeat(1, 1, 2).unsqueeze(2)
        return angle_BT1K.cos().to(dtype), angle_BT1K.sin().to(dtype)

    def output_weight(self) -> Tensor:
        """The language-model head's weight (V, D)."""
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens if tied else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight())

    def value(self, hidden: Tensor, dropout: Tensor | None = None) -> Tensor:
        """V (...) of hidden states (..., D), which are multiplied with `dropout` first."""
        if dropout is not None:
            hidden = hidden * dropout.to(hidden.dtype)
        return self.value_head(hidden.to(next(self.value_head.parameters()).dtype))

    def forward(
        self,
        token_BT: Tensor,
        position_BT: Tensor | None = None,
        mask: Tensor | BlockMask | PathMask | None = None,
        read: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits_BTV, value_BT). Without position and mask it is plain causal.

        `mask` as in `hidden`. `read(hidden_BTD)`, if given, takes the place of both heads, and its
        result is returned; it is called here because FSDP gathers the weights only for `forward`.
        """
        hidden_BTD = self.hidden(token_BT, position_BT, mask)
        if read:
            return read(hidden_BTD)
        return self.logits(hidden_BTD), self.value(hidden_BTD)


# ---------------------------------------------------------------------- masks and log-probabilities


def tree_mask(subtree_end_BT: Tensor) -> Tensor:
    """The mask (B, 1, T, T) of forests that are packed depth-first. The others below stand for it.

    Token q sees token k exactly when k <= q < subtree_end[k]. That is causality, ancestry,
    separation of siblings and isolation of packed documents in one line.
    """
    index_T = torch.arange(subtree_end_BT.shape[1], device=subtree_end_BT.device)
    query, key = index_T[:, None], index_T[None, :]
    return ((key <= query) & (query < subtree_end_BT[:, None, :])).unsqueeze(1)


def block_mask(subtree_end_BT: Tensor) -> BlockMask:
    """The same as a block mask of flex_attention, whose kernel skips the blocks nobody sees.

    All of a block of queries see all of an earlier block of keys if each of the keys' subtrees ends
    behind the queries. None see any if each ends before them.
    """
    rows, length = subtree_end_BT.shape
    blocks = math.ceil(length / TILE)
    # padding ends before every query: a block with padding is never seen as a whole
    padded_BT = F.pad(subtree_end_BT, (0, blocks * TILE - length))
    first_end_B1C, last_end_B1C = padded_BT.view(rows, 1, blocks, TILE).aminmax(dim=-1)
    key_C = torch.arange(blocks, device=subtree_end_BT.device) * TILE  # first of each block
    query_R1 = key_C[:, None]
    whole_BRC = (key_C < query_R1) & (first_end_B1C >= query_R1 + TILE)
    some_BRC = (key_C <= query_R1) & (last_end_B1C > query_R1) & ~whole_BRC

    def listed(chosen_BRC):  # for each block of queries, how many blocks of keys; these first
        order_BRC = chosen_BRC.int().argsort(dim=-1, descending=True, stable=True)
        return chosen_BRC.sum(-1, dtype=torch.int32)[:, None], order_BRC.int()[:, None]

    def sees(row, head, query, key):
        return (key <= query) & (query < subtree_end_BT[row, key])

    return BlockMask.from_kv_blocks(
        *listed(some_BRC), *listed(whole_BRC), TILE, sees, seq_lengths=(length, length)
    )


def path_mask(subtree_end_T: Tensor, block: int = 1) -> PathMask:
    """The same, for a line of T tokens, as blocks of queries with the keys that some of them see.

    Depth-first, the queries of a block lie close together in the tree and share most of their
    path. A key before the block's end is seen by some of them if its subtree ends behind the
    block's first query, and only the seen keys are computed with. `block` pads their number to its
    multiples with keys that nobody sees.
    """
    length = len(subtree_end_T)
    index_T = torch.arange(length, device=subtree_end_T.device)
    keys, seen = [], []
    for first in range(0, length, QUERIES):
        query_Q = index_T[first : first + QUERIES]
        key_S = index_T[: first + QUERIES][subtree_end_T[: first + QUERIES] > first]
        query_Q1 = query_Q[:, None]
        seen_QS = (key_S <= query_Q1) & (query_Q1 < subtree_end_T[key_S])
        padding = (0, -len(key_S) % block)
        keys.append(F.pad(key_S, padding))
        seen.append(F.pad(seen_QS, padding))
    return PathMask(torch.cat(keys), seen)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores: 0 where it is True, else minus infinity."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, -math.inf)


def attend_paths(q_1THK: Tensor, k_1TGK: Tensor, v_1TGK: Tensor, mask: PathMask) -> Tensor:
    """Attention under a PathMask (1, T, H, K), block by block.

    The heads that share a key stand in line as further queries of that key, as in
    `Attention.attend_keys`.
    """
    sizes = [seen_QS.shape[1] for seen_QS in mask.seen]
    queries = q_1THK[0].split(QUERIES)
    keys = k_1TGK[0].index_select(0, mask.key_X).split(sizes)
    values = v_1TGK[0].index_select(0, mask.key_X).split(sizes)
    groups = k_1TGK.shape[2]
    attended = []
    for q_QHK, k_SGK, v_SGK, seen_QS in zip(queries, keys, values, mask.seen):
        q_HQK = q_QHK.transpose(0, 1)
        q_1GQK = q_HQK.reshape(1, groups, -1, q_HQK.shape[2])
        k_1GSK = k_SGK.transpose(0, 1)[None]
        v_1GSK = v_SGK.transpose(0, 1)[None]
        out_1GQK = F.scaled_dot_product_attention(q_1GQK, k_1GSK, v_1GSK, attn_mask=seen_QS)
        attended.append(out_1GQK.reshape(q_HQK.shape).transpose(0, 1))
    return torch.cat(attended)[None]


def token_logp(hidden_MD: Tensor, weight_VD: Tensor, token_M: Tensor) -> Tensor:
    """log pi (M,) of each token, float32, from the final hidden state that predicts it.

    Logits are computed for chunks of tokens, and again in the backward pass, so at most LOGITS of
    them are held at once.
    """

    def chunk_logp(hidden_MD, token_M):
        logits_MV = F.linear(hidden_MD, weight_VD).float()
        return -F.cross_entropy(logits_MV, token_M, reduction="none")

    size = max(1, LOGITS // len(weight_VD))
    if len(token_M) <= size:
        return chunk_logp(hidden_MD, token_M)
    chunks = zip(hidden_MD.split(size), token_M.split(size))
    return torch.cat([checkpoint(chunk_logp, *chunk, use_reentrant=False) for chunk in chunks])


# -------------------------------------------------------------------------------- low-rank adapters


class LoRALinear(nn.Linear):
    """A frozen linear layer, and a change of low rank that is trained (LoRA, arXiv 2106.09685).

    It computes W x + LORA_SCALE * B A x, with A (rank, in) and B (out, rank), `lora_down` and
    `lora_up`, in float32. B begins at 0: without training, and while `active` is False, it is the
    layer that it was.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        device = layer.weight.device
        bound = 1 / math.sqrt(self.in_features)  # PEFT draws A like this, too
        drawn = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(drawn.to(device))
        self.lora_up = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.active:
            return out
        low = F.linear(x, self.lora_down.to(x.dtype))
        return out + LORA_SCALE * F.linear(low, self.lora_up.to(x.dtype))


def add_lora(model: Llama, rank: int, seed: int = 0) -> Llama:
    """Put adapters on all linear layers of the blocks; they and the value head are trained alone.

    The other weights are frozen and stay in their type; the value head becomes float32.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LoRALinear(layer, rank, generator))
    model.value_head.float().requires_grad_(True)
    return model


@contextlib.contextmanager
def without_lora(model: Llama):
    """Inside, the model is as it was before `add_lora`, but for its value head."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def merge_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model without adapters that computes the same; unsharded."""
    merged = {key: tensor for key, tensor in state.items() if "lora_" not in key}
    for key in state:
        layer, found, _ = key.rpartition("lora_down")
        if found:
            weight = merged[f"{layer}weight"]
            change = state[f"{layer}lora_up"].float() @ state[key].float()
            merged[f"{layer}weight"] = (weight.float() + LORA_SCALE * change).to(weight.dtype)
    return merged


def save_lora(state: dict[str, Tensor], base: Path, folder: Path):
    """Write the adapters among the tensors of a model as PEFT does; nothing if there are none.

    PEFT adds them to the model in `base`. The value head is no part of them.
    """
    tensors = {}
    for key, tensor in state.items():
        if "lora_" in key:
            name = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            tensors[f"base_model.model.{name}.weight"] = tensor.detach().float().contiguous().cpu()
    if not tensors:
        return
    rank = next(len(tensor) for key, tensor in tensors.items() if "lora_A" in key)
    names = sorted({key.split(".")[-3] for key in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": LORA_SCALE * rank,
        "lora_dropout": 0.0,
        "target_modules": names,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config, seal=False)


# ------------------------------------------------------------------------------- loading and saving


def read_config(folder: Path) -> LlamaConfig:
    """config.json of a folder; InputError for a field that we do not compute."""
    return parse_config(folder / "config.json", LlamaConfig)


def count_parameters(config: LlamaConfig, lora_rank: int = 0) -> tuple[int, int, int]:
    """The number of parameters of a whole model, of one block, and how many are trained."""
    with torch.device("meta"):
        model = Llama(config)
    whole, block = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model, model.model.layers[0])
    )
    if lora_rank:
        add_lora(model, lora_rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return whole, block, sum(parameter.numel() for parameter in trained)


def fresh_value_head(model: Llama, seed: int) -> dict[str, Tensor]:
    """Weights for a model that comes without a value head.

    normal(0, initializer_range / sqrt(hidden_size)) with bias 0, so that V is about 0. AlphaMath
    does not divide: with real hidden states V is then anywhere in (-1, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range / math.sqrt(model.config.hidden_size)
    tensors = {}
    for name, parameter in model.value_head.named_parameters(prefix="value_head"):
        if parameter.dim() > 1:
            tensor = torch.empty(parameter.shape, device="cpu")
            nn.init.normal_(tensor, 0.0, std, generator=generator)
        else:  # of a head of your own: biases 0, the weights of a norm 1
            tensor = torch.full(parameter.shape, float(not name.endswith("bias")), device="cpu")
        tensors[name] = tensor
    return tensors


def load_model(
    name: str | Path, device="cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Llama:
    """Load a model from a Hugging Face folder, preset or repository id, in evaluation mode.

    The network is built on the meta device and filled strictly: InputError for a tensor that is
    missing, left over or misshapen. Only the value head may be missing; a fresh one is drawn with
    `seed`.
    """
    folder = find_folder(name)
    if torch.device(device).type != "meta":
        check_files(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    tensors = match_names(folder, read_tensors(folder), model)
    if not any(key.startswith("value_head.") for key in tensors):
        tensors |= fresh_value_head(model, seed)
    check_tensors(folder, tensors, model)
    # copied, because the file's own memory is not aligned, and results would differ in the last bit
    state = {key: tensors[key].to(device=device, dtype=dtype, copy=True) for key in tensors}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def save_model(
    model: Llama,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
):
    """Write config.json, model.safetensors with its index, value_head.safetensors, checksums.json.

    The folder opens in transformers and vLLM: the index keeps the value head from readers that take
    every file. `state` replaces the model's own tensors where those are shards. Weights are written
    in `dtype`, or as they are, the value head in float32. Each file appears whole or not at all,
    config.json last: a folder that holds config.json is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(state or model.state_dict())
    head = {key: state.pop(key) for key in list(state) if key.startswith("value_head.")}
    state = {key: written(key, tensor, dtype or tensor.dtype) for key, tensor in state.items()}
    head = {key: written(key, tensor, torch.float32) for key, tensor in head.items()}
    (folder / "config.json").unlink(missing_ok=True)
    save_tensors(folder / HEAD, head)
    save_tensors(folder / WEIGHTS, state)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(state), WEIGHTS)}
    write_json(folder / INDEX, index, seal=False)
    for shard in folder.glob("model-*-of-*.safetensors"):  # of what was here before
        shard.unlink()
    config = {
        "architectures": [FAMILIES[model.config.model_type]],
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "sliding_window": None,
        **{key: REQUIRED[key] for key in ("hidden_act", "attention_bias", "mlp_bias")},
        **asdict(model.config),
    }
    text = json.dumps(config, indent=1) + "\n"
    files = [*copied_files(folder), folder / WEIGHTS, folder / HEAD, folder / INDEX]
    write_checksums(folder, files, **{"config.json": text})
    publish(folder / "config.json", lambda partial: partial.write_text(text))


def written(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is written: in `dtype`, whose range it must not leave."""
    copy = tensor.detach().to(dtype).contiguous().cpu()
    if tensor.dtype != dtype and not copy.isfinite().all():
        raise InputError(f"{key} holds numbers that {dtype} cannot hold")
    return copy


def save_tensors(file: Path, tensors: dict[str, Tensor]):
    """Write a safetensors file that appears whole or not at all."""
    publish(file, lambda partial: save_file(tensors, partial, {"format": "pt"}))
