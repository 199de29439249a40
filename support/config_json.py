"""config.json of a model's folder, read as the family's class in transformers 5 reads it.

A field that the class does not read cannot change the result and is ignored. One that it reads, and
that is not computed here, is refused by name unless its value has no effect. A field that is
missing has the class's default.
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
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
MISTRAL = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN = {
    **LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {  # model_type -> what its class sets where a field is missing
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
REQUIRED = {  # fields that are supported at one value only; null is the same as false
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "attention_chunk_size": None,
    "per_layer_config": None,
    "quantization_config": None,
    "transformers_weights": None,
    "configuration_files": None,
}
UNREAD = {  # fields of REQUIRED -> families whose class does not read them
    "attention_bias": ("mistral", "qwen2"),
    "mlp_bias": ("mistral", "qwen2", "qwen3"),
    "attention_chunk_size": ("qwen2", "qwen3"),
}
LAYERED = ("qwen2", "qwen3")  # families whose class reads what each layer is
WHOLE = {"partial_rotary_factor": (None, 1)}  # all dimensions of a head are rotated
PLAIN_ROPE = {  # rope_type -> the values at which it is plain rope, up to max_position_embeddings
    "default": {},
    "linear": {**WHOLE, "factor": (1,)},
    "dynamic": WHOLE,
    "yarn": {**WHOLE, "factor": (1,), "attention_factor": (None, 1)},
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
    """The fields in `known`; any other that changes the computation is refused."""
    family = raw.get("model_type")
    if family not in tuple(FAMILIES):
        raise InputError(f"model_type = {family!r} is not supported, only {', '.join(FAMILIES)}")
    raw = {"rms_norm_eps": 1e-6, **DEFAULTS.get(family, {}), **raw}
    if raw.get("hidden_act") == "swish":
        raw["hidden_act"] = "silu"  # two names of one function
    for key, only in REQUIRED.items():
        value = raw.get(key, only)
        if value != only and (value or only) and family not in UNREAD.get(key, ()):
            raise InputError(f"{key} = {value!r} is not supported, only {only!r}")
    move_rope(raw)
    apply_window(raw)
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    if not raw.get("head_dim"):
        raw["head_dim"] = raw.get("hidden_size", 0) // max(1, raw.get("num_attention_heads", 1))
    return {key: value for key, value in raw.items() if key in known}


def move_rope(raw: dict):
    """Set rope_theta and rope_scaling, whatever fields of `raw` they stand in."""
    rope = raw.pop("rope_scaling", None) or raw.get("rope_parameters") or {}  # the first one counts
    layered = raw["model_type"] in LAYERED
    if type(rope) is not dict or layered and any(type(value) is dict for value in rope.values()):
        raise InputError(f"rope_scaling = {rope} (or rope_parameters) must be one set of numbers")
    outside = {key: raw.get(key) for key in WHOLE}
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **outside, **rope}
    raw["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    for plain, values in PLAIN_ROPE.items():
        if kind == plain and has_values(rope, values):
            return
    length = "original_max_position_embeddings"  # outside it counts before the one inside
    rope[length] = raw.get(length, rope.get(length, raw.get("max_position_embeddings")))
    numbers = {key: rope.get(key) for key in LLAMA3_ROPE}
    valid = all(type(value) in (int, float) and 0 < value < 1e12 for value in numbers.values())
    complete = kind == "llama3" and has_values(rope, WHOLE) and valid
    if not complete or not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise InputError(
            f"rope_scaling or rope_parameters of rope_type {kind!r} with {rope} is not supported, "
            f"only 'llama3' with {sorted(LLAMA3_ROPE)}"
        )
    raw["rope_scaling"] = {"rope_type": "llama3", **numbers}


def has_values(rope: dict, values: dict) -> bool:
    """Whether each field of `values` has one of its values."""
    return all(rope.get(key) in allowed for key, allowed in values.items())


def apply_window(raw: dict):
    """Bound max_position_embeddings by a sliding window of all layers: up to there it is unused.

    LLaMA's class does not read sliding_window, but its cache does.
    """
    window, kinds = raw.get("sliding_window"), raw.get("layer_types") or []
    length = raw.get("max_position_embeddings", window)
    known = ("full_attention", "attention", "sliding_attention")
    if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
        raise InputError(f"layer_types = {kinds!r} is not supported, only 'full_attention'")
    sliding = "sliding_attention" in kinds
    if raw["model_type"] in LAYERED:
        if not raw.get("use_sliding_window"):
            window = None
        elif not kinds:
            sliding = raw["num_hidden_layers"] > raw["max_window_layers"] and window is not None
        if sliding and not (type(window) is int and window >= length):
            raise InputError(
                f"sliding_window = {window!r} of some layers is not supported (see "
                "use_sliding_window, layer_types and max_window_layers)"
            )
    elif window is not None and (sliding or not kinds):
        if type(window) is not int or window < 1:
            raise InputError(f"sliding_window must be a positive whole number, not {window!r}")
        raw["max_position_embeddings"] = min(window, length)


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
    ids = (config.bos_token_id, config.pad_token_id, *ends)
    if type(config.tie_word_embeddings) is not bool or not all(
        value is None or type(value) is int for value in ids
    ):
        raise InputError(
            "tie_word_embeddings must be true or false, and bos_token_id, eos_token_id and "
            "pad_token_id token ids"
        )
    if config.head_dim % 2 or config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{config.num_attention_heads} query heads of width {config.head_dim} must be of even "
            f"width and share {config.num_key_value_heads} key/value heads evenly "
            "(num_attention_heads, head_dim, num_key_value_heads)"
        )
