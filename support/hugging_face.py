"""Folders in Hugging Face's layout: where they are, and how their weights are read.

They are read as from strangers: a file that does not fit is refused by name.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from support.files import read_json
from support.flags import InputError

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


# ------------------------------------------------------------------------------------------ weights


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
