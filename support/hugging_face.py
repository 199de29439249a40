"""Folders in Hugging Face's layout: where they are, and how their files are read.

They are read as from strangers. A field that would change the computation and is not implemented,
or a file that does not fit, is refused by name.
"""

from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

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

# ------------------------------------------------------------------------------------------ presets

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
LLAMA_3 = {
    **LLAMA,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
QWEN_MATH_1B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
}
QWEN_MATH_7B = {
    **QWEN_MATH_1B,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMOLLM_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMOLLM_360M = {
    **SMOLLM_135M,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}
PRESETS = {  # name -> (Hugging Face repository, the shape in its config.json, for plans)
    "llama-7b": ("huggyllama/llama-7b", LLAMA),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", {**LLAMA, "max_position_embeddings": 4096}),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", LLAMA_3),
    "deepseekmath-7b": (
        "deepseek-ai/deepseek-math-7b-base",
        {**LLAMA, "vocab_size": 102400, "num_hidden_layers": 30, "max_position_embeddings": 4096},
    ),
    "qwen2.5-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", QWEN_MATH_1B),
    "qwen2.5-math-7b": ("Qwen/Qwen2.5-Math-7B", QWEN_MATH_7B),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM_135M),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM_360M),
}


def find_folder(name: str | Path, files: tuple = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """The folder of a model: a local folder as it is, else a preset or repository id.

    The latter two are downloaded with huggingface-hub. InputError if there is no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    repository = PRESETS.get(str(name), (str(name),))[0]
    is_id = repository.count("/") == 1 and not repository.startswith((".", "/", "~"))
    if str(name) not in PRESETS and not is_id:
        presets = ", ".join(PRESETS)
        raise InputError(
            f"{name}: no such folder, and not a preset ({presets}) or repository id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:  # network, authorisation, unknown repository: the same for the user
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{name}: no such folder, and downloading {repository} failed: {reason}")


# -------------------------------------------------------------------------------------- config.json


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


# ------------------------------------------------------------------------------- weights and tokens


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors or the shards of its index, then value_head.safetensors if there is one."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if not files[0].exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise InputError(f"{index}: needs a 'weight_map' of tensor names to files")
        files = [folder / name for name in sorted(set(shards.values()))]
    head = folder / "value_head.safetensors"
    return [*files, head] if head.exists() else files


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name, those of the value head included."""
    tensors = {}
    for file in weight_files(folder):
        if not file.exists():
            raise InputError(
                f"{file}: no such file; convert other weight formats to safetensors first"
            )
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})")
    return tensors


def check_tensors(folder: Path, tensors: dict[str, Tensor], model):
    """Refuse tensors that are missing, left over, misshapen or not made of finite numbers."""
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    for problem, keys in (("missing tensor", missing), ("unexpected tensor", unexpected)):
        if keys:
            raise InputError(f"{folder}: {problem} {keys[0]} ({len(keys)} in all)")
    for key, shape in wanted.items():
        tensor = tensors[key]
        if tensor.shape != shape:
            raise InputError(
                f"{folder}: {key} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise InputError(
                f"{folder}: {key} holds {tensor.dtype} or numbers that are not finite; "
                "float weights are wanted"
            )


def read_tokenizer(folder: Path) -> tuple[Tokenizer, list[int]]:
    """tokenizer.json, and the end-of-text ids of config.json and generation_config.json."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file}: not a readable tokenizer ({error})")
    eos_ids = set()
    vocabulary = 2**24
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            vocabulary = raw.get("vocab_size", vocabulary)
            eos_ids |= set(end_ids(raw.get("eos_token_id"), vocabulary, folder / name))
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not 0 < size <= vocabulary:
        raise InputError(
            f"{file}: token ids up to {size - 1}, but the model's vocabulary has {vocabulary}"
        )
    return tokenizer, sorted(eos_ids)


def end_ids(value, vocabulary, file: Path) -> list[int]:
    """An `eos_token_id` of a file as a list; it may be a number, a list or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = type(vocabulary) is int
    if not known or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise InputError(
            f"{file}: vocab_size and eos_token_id must be a number, and token ids below it"
        )
    return ids
