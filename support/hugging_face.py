"""Folders in Hugging Face's layout, read as from strangers: what would change the computation, or does not fit, is refused by name."""
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from support.files import read_json
from support.flags import InputError

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
HARMLESS = {  # config.json fields that do not change the computation here
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "pad_token_id", "_name_or_path", "attention_dropout",
    "chunk_size_feed_forward", "is_encoder_decoder", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
    "_attn_implementation_autoset", "_from_model_config", "is_llama_config", "transformers.js_config", "max_sequence_length", "max_window_layers"}
REQUIRED = {  # fields that are supported at one value only
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_interleaved": False, "quantization_config": None,
    "use_sliding_window": False}


def parse_config(path: Path, kind: type):
    """config.json as `kind` (model.LlamaConfig)."""
    raw = read_json(path)
    try:
        config = kind(**supported(raw, {field.name for field in fields(kind)}))
        check_values(config)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # InputError is one of these
        raise InputError(f"{path}: {error}")
    return config


def supported(raw: dict, names: set[str]) -> dict:
    """The fields that are known; every other that would change the computation is refused."""
    if raw.get("model_type") not in tuple(FAMILIES):
        raise InputError(f"model_type = {raw.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
    read_rope(raw)
    window = raw.pop("sliding_window", None)
    if raw["model_type"] == "mistral" and window:  # no window within its length
        raw["max_position_embeddings"] = min(window, raw.get("max_position_embeddings", window))
    elif window and raw.get("use_sliding_window", raw["model_type"] == "llama"):
        raise InputError(f"sliding_window = {window!r} is not supported")
    if set(raw.pop("layer_types", None) or []) - {"full_attention"}:
        raise InputError("layer_types other than 'full_attention' are not supported")
    for key, value in raw.items():
        if key in REQUIRED and value != REQUIRED[key]:
            raise InputError(f"{key} = {value!r} is not supported, only {REQUIRED[key]!r}")
        if key not in REQUIRED and key not in HARMLESS and key not in names:
            raise InputError(f"unknown field {key!r} may change the computation and is not supported")
    given = {key: value for key, value in raw.items() if key in names}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if not given.get("head_dim"):
        given["head_dim"] = given.get("hidden_size", 0) // max(1, given.get("num_attention_heads", 1))
    given.setdefault("rms_norm_eps", 1e-6)  # Hugging Face's default where the file is silent
    return given


def read_rope(raw: dict):
    """rope_theta and rope_scaling out of whatever fields they stand in."""
    rope = {**(raw.pop("rope_scaling", None) or {}), **(raw.pop("rope_parameters", None) or {})}  # transformers 5 has the second
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind != "default" or rope:
        wanted = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if kind != "llama3" or rope.keys() != wanted or not all(type(value) in (int, float) and value > 0 for value in rope.values()) \
                or not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise InputError(f"rope_scaling of rope_type {kind!r} with {rope} is not supported, only 'llama3' with {sorted(wanted)}")
        raw["rope_scaling"] = {"rope_type": "llama3", **rope}


def check_values(config):
    """Refuse numbers that no network can have."""
    for field in fields(config):
        value, whole, most = getattr(config, field.name), field.type is int, 1000 if field.name == "num_hidden_layers" else 2**24
        if whole and not (type(value) is int and 0 < value < most) or field.type is float and not (type(value) in (int, float) and 0 <= value < 1e12 and (value or field.name != "rope_theta")):
            raise InputError(f"{field.name} must be a positive {f'whole number under {most}' if whole else 'number'}, not {value!r}")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if type(config.tie_word_embeddings) is not bool or not all(value is None or type(value) is int for value in (config.bos_token_id, *ends)):
        raise InputError("tie_word_embeddings must be true or false, and bos_token_id and eos_token_id token ids")
    if config.head_dim % 2 or config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"{config.num_attention_heads} query heads of width {config.head_dim} must be of even width and share "
                         f"{config.num_key_value_heads} key/value heads evenly")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, and of
    value_head.safetensors where there is one."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if not files[0].exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{index}: needs a 'weight_map' of tensor names to files")
        files = [folder / name for name in sorted(set(shards.values()))]
    if (folder / "value_head.safetensors").exists():
        files.append(folder / "value_head.safetensors")
    tensors = {}
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: no such file; convert other weight formats to safetensors first")
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})")
    return tensors


def check_tensors(folder: Path, tensors: dict[str, Tensor], model):
    """Refuse what is missing, left over, misshapen or not made of finite numbers."""
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    for problem, keys in (("missing tensor", wanted.keys() - tensors.keys()),
                          ("unexpected tensor", tensors.keys() - wanted.keys())):
        if keys:
            raise InputError(f"{folder}: {problem} {sorted(keys)[0]} ({len(keys)} in all)")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise InputError(f"{folder}: {key} has shape {list(tensors[key].shape)}, config.json asks for {list(shape)}")
        if not tensors[key].is_floating_point() or not tensors[key].float().isfinite().all():
            raise InputError(f"{folder}: {key} holds {tensors[key].dtype} or numbers that are not finite; float weights are wanted")


def read_tokenizer(folder: Path) -> tuple[Tokenizer, list[int]]:
    """tokenizer.json, and the end-of-text ids from config.json and generation_config.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a readable tokenizer ({error})")
    eos_ids, vocabulary, size = set(), 2**24, 1 + max(tokenizer.get_vocab().values(), default=-1)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            ids, vocabulary = raw.get("eos_token_id"), raw.get("vocab_size", vocabulary)
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if type(vocabulary) is not int or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
                raise InputError(f"{folder / name}: vocab_size and eos_token_id must be a number, and token ids below it")
            eos_ids |= set(ids)
    if not 0 < size <= vocabulary:
        raise InputError(f"{path}: token ids up to {size - 1}, but the model's vocabulary has {vocabulary}")
    return tokenizer, sorted(eos_ids)
