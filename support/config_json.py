"""config.json of a model's folder, read as transformers reads it.

A field that would change the computation and is not implemented is refused by name.
"""

from dataclasses import fields
from pathlib import Path

from support.files import read_json
from support.flags import InputError

FAMILIES = {  # model_type -> architecture
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
HARMLESS = {  # fields of config.json that do not change the computation here
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "pad_token_id",
    "_name_or_path",
    "attention_dropout",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "id2label",
    "label2id",
    "problem_type",
    "_attn_implementation_autoset",
    "_from_model_config",
    "is_llama_config",
    "transformers.js_config",
    "max_sequence_length",
    "max_window_layers",
}
REQUIRED = {  # fields of config.json that are supported at one value only
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "quantization_config": None,
    "use_sliding_window": False,
}
ROPE_FIELDS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def parse_config(file: Path, kind: type):
    """config.json as an instance of the dataclass `kind` (model.LlamaConfig)."""
    raw = read_json(file)
    try:
        config = kind(**supported_fields(raw, {field.name for field in fields(kind)}))
        check_config(config)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{file}: {error}")  # InputError is a ValueError
    return config


def supported_fields(raw: dict, known: set[str]) -> dict:
    """The fields in `known`; every other field that would change the computation is refused."""
    if raw.get("model_type") not in tuple(FAMILIES):
        families = ", ".join(FAMILIES)
        raise InputError(
            f"model_type = {raw.get('model_type')!r} is not supported, only {families}"
        )
    move_rope(raw)
    apply_window(raw)
    if set(raw.pop("layer_types", None) or []) - {"full_attention"}:
        raise InputError("layer_types other than 'full_attention' are not supported")
    for key, value in raw.items():
        if key in REQUIRED and value != REQUIRED[key]:
            raise InputError(f"{key} = {value!r} is not supported, only {REQUIRED[key]!r}")
        if key not in REQUIRED and key not in HARMLESS and key not in known:
            raise InputError(
                f"unknown field {key!r} may change the computation and is not supported"
            )
    given = {key: value for key, value in raw.items() if key in known}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if not given.get("head_dim"):
        heads = max(1, given.get("num_attention_heads", 1))
        given["head_dim"] = given.get("hidden_size", 0) // heads
    given.setdefault("rms_norm_eps", 1e-6)  # Hugging Face's default
    return given


def move_rope(raw: dict):
    """Set rope_theta and rope_scaling, whatever fields of `raw` they stand in."""
    rope = dict(raw.pop("rope_scaling", None) or {})
    rope |= raw.pop("rope_parameters", None) or {}  # the name in transformers 5
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default" and not rope:
        return
    numbers = all(type(value) in (int, float) and value > 0 for value in rope.values())
    complete = kind == "llama3" and rope.keys() == ROPE_FIELDS and numbers
    if not complete or not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise InputError(
            f"rope_scaling of rope_type {kind!r} with {rope} is not supported, "
            f"only 'llama3' with {sorted(ROPE_FIELDS)}"
        )
    raw["rope_scaling"] = {"rope_type": "llama3", **rope}


def apply_window(raw: dict):
    """Remove sliding_window. Mistral is used up to the window's length, where it has no effect."""
    window = raw.pop("sliding_window", None)
    if raw["model_type"] == "mistral" and window:
        length = raw.get("max_position_embeddings", window)
        raw["max_position_embeddings"] = min(window, length)
    elif window and raw.get("use_sliding_window", raw["model_type"] == "llama"):
        raise InputError(f"sliding_window = {window!r} is not supported")


def check_config(config):
    """Refuse numbers that no network can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        most = 1000 if field.name == "num_hidden_layers" else 2**24
        if field.type is int and not (type(value) is int and 0 < value < most):
            raise InputError(
                f"{field.name} must be a positive whole number under {most}, not {value!r}"
            )
        if field.type is float:
            number = type(value) in (int, float) and 0 <= value < 1e12
            if not number or value == 0 and field.name == "rope_theta":
                raise InputError(f"{field.name} must be a positive number, not {value!r}")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = (config.bos_token_id, *ends)
    if type(config.tie_word_embeddings) is not bool or not all(
        value is None or type(value) is int for value in ids
    ):
        raise InputError(
            "tie_word_embeddings must be true or false, and bos_token_id and eos_token_id token ids"
        )
    if config.head_dim % 2 or config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{config.num_attention_heads} query heads of width {config.head_dim} must be of even "
            f"width and share {config.num_key_value_heads} key/value heads evenly"
        )
