"""LLaMA with a value head: the network, the tree mask, the tree-shaped KV cache, loading and saving.

Module and parameter names equal Hugging Face's `LlamaForCausalLM`, so that checkpoints load without conversion. One
forward pass returns both heads: next-token logits, and the value V in (-1, 1) of the partial solution that ends at
each token (AlphaMath section 3: linear + tanh on the last hidden state).

Dimension key: B rows (trees, packs or questions), T tokens fed, S cached + new tokens, D width, V vocabulary,
H query heads, G key/value heads, K head width, F feed-forward width, L layers.
"""
import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from support.files import publish, write_json
from support.flags import InputError
from support.hugging_face import FAMILIES, REQUIRED, check_tensors, parse_config, read_tensors
from tasks.published import find_folder


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
    model_type: str = "llama"  # qwen2: q, k and v have biases; qwen3: q and k are normalised
    rope_scaling: dict | None = None  # LLaMA 3.1's


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
def flex():  # compiled where there is a kernel for it
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, index: int):
        super().__init__()
        self.index = index  # of the layer, by which the cache knows it
        self.heads, self.groups, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.model_type == "qwen2")
        self.k_proj = nn.Linear(c.hidden_size, self.groups * c.head_dim, bias=c.model_type == "qwen2")
        self.v_proj = nn.Linear(c.hidden_size, self.groups * c.head_dim, bias=c.model_type == "qwen2")
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) if c.model_type == "qwen3" else nn.Identity() for _ in "qk")

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "TreeCache | None") -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, self.heads, self.head_dim)), cos, sin)
        k_BTGK = rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, self.groups, self.head_dim)), cos, sin)
        v_BTGK = self.v_proj(x_BTD).view(B, T, self.groups, self.head_dim)
        if cache is not None:  # from one flat line of tokens to the cache's rows
            q_BTHK, k_BTGK, v_BTGK = cache.unroll(self.index, q_BTHK, k_BTGK, v_BTGK)
        q_BHTK, k_BGSK, v_BGSK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if isinstance(mask, BlockMask):
            out_BHTK = flex()(q_BHTK, k_BGSK, v_BGSK, block_mask=mask, enable_gqa=self.heads != self.groups)
        elif cache is None:
            out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=mask is None,
                                                      enable_gqa=self.heads != self.groups)
        else:  # the query heads of a group stand in line as further queries: keys are read once, not once a head
            q_BGXK = q_BHTK.reshape(q_BHTK.shape[0], self.groups, -1, self.head_dim)
            out_BHTK = F.scaled_dot_product_attention(q_BGXK, k_BGSK, v_BGSK, attn_mask=mask).reshape(q_BHTK.shape)
        out_BTHK = out_BHTK.transpose(1, 2)
        if cache is not None:
            out_BTHK = cache.roll_up(out_BTHK)
        return self.o_proj(out_BTHK.reshape(B, T, -1))


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

    def block(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "TreeCache | None") -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part that Hugging Face names `model`."""
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, index) for index in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Decoder-only transformer with a language-model head (tied to the embedding or not) and a value head."""
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = nn.Linear(config.hidden_size, 1)

    def init_weights(self, seed: int = 0):
        """Draw fresh weights: normal(0, initializer_range), residual outputs scaled down by depth as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.initializer_range
                nn.init.normal_(parameter, 0.0, std, generator=generator)
        nn.init.zeros_(self.value_head.bias)
        return self

    def hidden(self, token_BT: Tensor, position_BT: Tensor | None = None, mask: Tensor | None = None,
               cache: "TreeCache | None" = None) -> Tensor:
        """Final hidden states (B, T, D); both heads are linear functions of them."""
        if position_BT is None:
            position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(token_BT)
        x_BTD = self.model.embed_tokens(token_BT)
        cos, sin = self.rotary(position_BT, x_BTD.dtype)
        if isinstance(mask, Tensor):  # additive, converted once
            mask = torch.zeros(mask.shape, device=mask.device, dtype=x_BTD.dtype).masked_fill_(~mask, -math.inf)
        if cache is not None:  # repeated for the query heads that share a key (see Attention)
            mask = mask.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos, sin, mask, cache)
        return self.model.norm(x_BTD)

    def rotary(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, 1, K) of the rotary angles, computed in float32 from positions: no buffer to lose on meta."""
        width = self.config.head_dim
        frequency_K = self.config.rope_theta ** -(torch.arange(0, width, 2, device=position_BT.device).float() / width)
        if scaling := self.config.rope_scaling:  # long waves are stretched, short ones are not (LLaMA 3.1)
            turns_K = scaling["original_max_position_embeddings"] * frequency_K / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept_K = ((turns_K - low) / (high - low)).clamp(0, 1)
            frequency_K = kept_K * frequency_K + (1 - kept_K) * frequency_K / scaling["factor"]
        angle_BT1K = (position_BT[..., None].float() * frequency_K).repeat(1, 1, 2).unsqueeze(2)
        return angle_BT1K.cos().to(dtype), angle_BT1K.sin().to(dtype)

    def output_weight(self) -> Tensor:
        """The language-model head's weight (V, D)."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight())

    def value(self, hidden: Tensor, dropout: Tensor | None = None) -> Tensor:
        """V in (-1, 1), float32, of the prefix that ends at each hidden state (..., D), which `dropout` is multiplied with."""
        hidden = hidden if dropout is None else hidden * dropout.to(hidden.dtype)
        return torch.tanh(self.value_head(hidden).squeeze(-1).float())

    def forward(self, token_BT: Tensor, position_BT: Tensor | None = None, mask: Tensor | None = None,
                read=None) -> tuple[Tensor, Tensor]:
        """(logits_BTV, value_BT). Without position and mask it is plain causal. `mask` (B, 1, T, S) is True where a query may
        look, or a BlockMask. `read(hidden_BTD)` takes the heads' place where it is given; called here, because FSDP holds the
        weights together only within `forward`."""
        hidden_BTD = self.hidden(token_BT, position_BT, mask)
        return read(hidden_BTD) if read else (self.logits(hidden_BTD), self.value(hidden_BTD))


def tree_mask(subtree_end_BT: Tensor) -> Tensor:
    """Boolean mask (B, 1, T, T) of a depth-first packed forest: token q sees token k iff k <= q < subtree_end[k].

    That is causality, ancestry, separation of siblings and isolation of packed documents in one line.
    """
    index_T = torch.arange(subtree_end_BT.shape[1], device=subtree_end_BT.device)
    query, key = index_T[:, None], index_T[None, :]
    return ((key <= query) & (query < subtree_end_BT[:, None, :])).unsqueeze(1)


def block_mask(subtree_end_BT: Tensor) -> BlockMask:
    """The same as a block mask of flex_attention, whose kernel skips the blocks that nobody sees."""
    rows, length = subtree_end_BT.shape
    return create_block_mask(lambda row, head, query, key: (key <= query) & (query < subtree_end_BT[row, key]),
                             rows, None, length, length, device=subtree_end_BT.device)


class TreeCache:
    """Keys and values of many partial solutions: one row a question, one slot a token, in any order of growth.

    A forward pass feeds one flat line of X tokens without padding; `at` says beforehand which row, lane (query of the
    row) and slot each belongs to, and how many slots are read. The mask says which slots a lane sees. Complete steps are
    copied to `store`, a second memory of one place a token, and those of a path that is extended again come back from
    there: so a pass reads the slots of the paths being extended, not those of the whole tree.
    """
    def __init__(self, config: LlamaConfig, rows: int, slots: int, places: int = 0, device="cpu", dtype=torch.float32):
        def memory(length):
            return torch.zeros(config.num_hidden_layers, 2, rows, length, config.num_key_value_heads, config.head_dim,
                               device=device, dtype=dtype)
        self.slots_L2BSGK, self.store_L2BPGK = memory(slots), memory(places)

    def at(self, row_X: Tensor, lane_X: Tensor, slot_X: Tensor, lanes: int, length: int, rows_R: Tensor | None = None):
        """Describe the next pass; `row_X` counts among `rows_R` where that is given, among all rows otherwise."""
        self.row_X, self.lane_X, self.slot_X, self.rows_R = row_X, lane_X, slot_X, rows_R
        self.lanes, self.length = lanes, length
        return self

    def unroll(self, layer: int, q_1XHK: Tensor, k_1XGK: Tensor, v_1XGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values; return queries by row and lane, keys and values by row and slot."""
        memory_2BSGK = self.slots_L2BSGK[layer]
        cache_row_X = self.row_X if self.rows_R is None else self.rows_R[self.row_X]
        memory_2BSGK[0, cache_row_X, self.slot_X] = k_1XGK[0]
        memory_2BSGK[1, cache_row_X, self.slot_X] = v_1XGK[0]
        read_2RSGK = memory_2BSGK[:, :, :self.length] if self.rows_R is None else memory_2BSGK[:, self.rows_R, :self.length]
        q_RNHK = q_1XHK.new_zeros(read_2RSGK.shape[1], self.lanes, *q_1XHK.shape[2:])
        q_RNHK[self.row_X, self.lane_X] = q_1XHK[0]
        return q_RNHK, read_2RSGK[0], read_2RSGK[1]

    def roll_up(self, out_RNHK: Tensor) -> Tensor:
        """The flat line again (1, X, H, K)."""
        return out_RNHK[self.row_X, self.lane_X].unsqueeze(0)

    def put_away(self, row: int, slot_X: Tensor, place: int):
        """Copy tokens of a row from their slots to the store, from `place` on."""
        self.store_L2BPGK[:, :, row, place:place + len(slot_X)] = self.slots_L2BSGK[:, :, row, slot_X]

    def fetch(self, row: int, place_X: Tensor, slot: int):
        """Copy tokens of a row from the store to its slots, from `slot` on."""
        self.slots_L2BSGK[:, :, row, slot:slot + len(place_X)] = self.store_L2BPGK[:, :, row, place_X]


# ------------------------------------------------------------------------------------------------ loading and saving

def read_config(folder: Path) -> LlamaConfig:
    """config.json; every field that would change the computation and is not implemented is refused by name."""
    return parse_config(folder / "config.json", LlamaConfig)


def load_model(name: str | Path, device="cpu", dtype=torch.float32, seed: int = 0) -> Llama:
    """Load a model from a Hugging Face folder, preset or repository id, in evaluation mode.

    The network is built on the meta device and filled strictly: a missing, left-over or misshapen tensor raises
    InputError. Only the value head may be missing; it then starts at normal(0, initializer_range / sqrt(hidden_size))
    with bias 0, so that V is about 0 (AlphaMath does not divide: with real hidden states V is then anywhere in (-1, 1)).
    """
    folder = find_folder(name)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    tensors = {key: tensor for key, tensor in read_tensors(folder).items() if not key.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise InputError(f"{folder}: config.json ties the embeddings, but lm_head.weight differs from them")
    if "value_head.weight" not in tensors:
        weight = torch.empty(1, config.hidden_size)
        std = config.initializer_range / math.sqrt(config.hidden_size)
        nn.init.normal_(weight, 0.0, std, generator=torch.Generator().manual_seed(seed))
        tensors |= {"value_head.weight": weight, "value_head.bias": torch.zeros(1)}
    check_tensors(folder, tensors, model)
    # copied, because the file's own memory is not aligned, and results would differ in the last bit
    state = {key: tensor.to(device=device, dtype=dtype, copy=True) for key, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def save_model(model: Llama, folder: str | Path, state: dict[str, Tensor] | None = None):
    """Write config.json, model.safetensors and value_head.safetensors; the folder opens in transformers and vLLM. `state`
    replaces the model's own tensors where those are shards.

    Each file appears whole or not at all, config.json last: a folder that holds config.json is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in (state or model.state_dict()).items()}
    head = {key: state.pop(key) for key in list(state) if key.startswith("value_head.")}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    fixed = {key: value for key, value in REQUIRED.items() if key in ("hidden_act", "attention_bias", "mlp_bias")}
    config = {"architectures": [FAMILIES[model.config.model_type]], "torch_dtype": dtype, "sliding_window": None, **fixed,
              **asdict(model.config)}
    for name, part in (("value_head.safetensors", head), ("model.safetensors", state)):
        publish(folder / name, lambda aside: save_file(part, aside, {"format": "pt"}))
    write_json(folder / "config.json", config)
