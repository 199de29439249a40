"""Folders in Hugging Face's layout: where they are, and how their weights are read.

They are read as from strangers: a file that does not fit is refused by name.
"""

import glob
import hashlib
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from support import config_json
from support.files import is_plain, publish, read_json
from support.flags import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "value_head.safetensors"
DOWNLOADED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", WEIGHTS, HEAD)
COPIED = (  # patterns of the files that go with a model's weights
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
DTYPES = {  # as a safetensors file names them
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
BUFFERS = re.compile(r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
WRAPPERS = {  # part of a tensor's name -> what puts it there
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "pretrained_model.": "TRL",
    "module.": "DistributedDataParallel",
}

# ------------------------------------------------------------------------------------------ presets

LLAMA = {**config_json.LLAMA, "num_key_value_heads": 32, "head_dim": 128}
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


def find_folder(name: str | Path, files: tuple = ()) -> Path:
    """The folder of a model: a local folder as it is, else a preset or repository id.

    The latter two are downloaded with huggingface-hub: `files`, or what is needed to load and copy
    the model. InputError if there is no such model.
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
    folder = download(repository, files or DOWNLOADED)
    if not files and not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        shards = [glob.escape(shard) for shard in shard_names(folder)]
        download(repository, (*DOWNLOADED, *shards), folder.name)  # of the same commit
    return folder


def download(repository: str, files: tuple, revision: str | None = None) -> Path:
    """The files of a repository that match the patterns `files`; offline, those of the cache."""
    from huggingface_hub import snapshot_download

    ours = {"allow_patterns": list(files), "ignore_patterns": ["*/*.json"]}  # original/params.json
    try:
        return Path(snapshot_download(repository, revision=revision, **ours))
    except Exception as error:  # network, authorisation, unknown repository: the same for the user
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{repository}: no such folder, and the download failed: {reason}")


def copied_files(folder: Path) -> list[Path]:
    """What goes with the weights of a model's folder (COPIED)."""
    return [file for pattern in COPIED for file in folder.glob(pattern)]


def model_files(name: str | Path) -> list[Path]:
    """The files of a local folder that are a model's; none if there is no such folder."""
    if not name:
        return []
    folder = Path(name)
    return [
        *folder.glob("*.safetensors"),
        folder / INDEX,
        folder / "config.json",
        *copied_files(folder),
    ]


def copy_files(source: Path, target: Path):
    """Copy what goes with a model's weights (COPIED); what `source` lacks goes from `target`.

    Each file appears whole or not at all.
    """
    old = set(copied_files(target))
    for file in copied_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        publish(copy, lambda partial, file=file: shutil.copyfile(file, partial))
        old.discard(copy)
    for copy in old:
        copy.unlink()


# ------------------------------------------------------------------------------------------ weights


def shard_names(folder: Path) -> list[str]:
    """The files that a folder's index names, none of them outside the folder."""
    index = folder / INDEX
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise InputError(f"{index}: needs a 'weight_map' of tensor names to files")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: {name!r} is no file of this folder")
    return names


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors or the shards of its index, then value_head.safetensors if there is one."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: adapter_config.json makes this a LoRA adapter; merge it into its model and "
            "save that (PEFT: merge_and_unload, save_pretrained)"
        )
    files = [folder / WEIGHTS]
    if not is_plain(files[0]) and is_plain(folder / INDEX):
        files = [folder / name for name in shard_names(folder)]
    for file in files:
        if not is_plain(file):
            hint = "convert other weight formats to safetensors first"
            named = file.name != WEIGHTS
            raise InputError(f"{file}: no such file; {f'{INDEX} names it' if named else hint}")
    head = folder / HEAD
    return [*files, head] if is_plain(head) else files


def weights_mark(folder: Path) -> str:
    """A hash of a folder's weights: the size of each file, and 64 pieces of 4 KiB spread over it.

    It tells weights of another training apart, for the time of reading a quarter of a megabyte a
    file. A few changed numbers may be missed.
    """
    mark = hashlib.blake2b(digest_size=16)
    for file in weight_files(folder):
        size = file.stat().st_size
        mark.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            for place in range(64):
                content.seek(place * max(0, size - 4096) // 63)
                mark.update(content.read(4096))
    return mark.hexdigest()


def tensor_types(file: Path) -> Counter:
    """How many numbers of each torch type a file holds; only its header is read.

    Other types than DTYPES are refused, except those of buffers.
    """
    counts = Counter()
    try:
        with safe_open(file, "pt") as tensors:
            for key in sorted(tensors.keys()):
                part = tensors.get_slice(key)
                kind = part.get_dtype()
                if BUFFERS.search(key):
                    continue
                if kind not in DTYPES:
                    raise InputError(
                        f"{file}: {key} is quantized or no weight ({kind}); float weights are "
                        f"wanted ({', '.join(DTYPES)})"
                    )
                counts[DTYPES[kind]] += math.prod(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})")
    return counts


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that most numbers of a folder's model are stored in, its value head left aside."""
    counts = Counter()
    for file in weight_files(folder):
        if file.name != HEAD:
            counts += tensor_types(file)
    if not counts:
        raise InputError(f"{folder}: holds no weights")
    return counts.most_common(1)[0][0]


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever types."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(wide), other.to(wide))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name, those of the value head included.

    A tensor may stand in two shards if it is the same: which one counts depends on the reader.
    """
    tensors = {}
    for file in weight_files(folder):
        tensor_types(file)
        try:
            found = load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})")
        for key, tensor in found.items():
            head = file.name == HEAD
            if head and not key.startswith("value_head."):
                raise InputError(f"{file}: {key} is no tensor of a value head")
            if key in tensors and (head or not equal(tensor, tensors[key])):
                raise InputError(f"{file}: {key} is in another file of the folder, too")
        tensors |= found
    return tensors


def match_names(folder: Path, found: dict[str, Tensor], model) -> dict[str, Tensor]:
    """The tensors under the names that `model` has for them, as transformers finds them.

    Buffers of the rotary embedding are left out: they follow from config.json. The names of a
    model without a head lack "model.". With tied embeddings the language-model head may stand in
    for the embeddings, and must not differ from them.
    """
    wanted = {"lm_head.weight", *(key for key, _ in model.named_parameters())}
    tensors = {}
    for key, tensor in found.items():
        if BUFFERS.search(key):
            continue
        names = (key, f"model.{key}", key.removeprefix("model."))
        name = next((name for name in names if name in wanted), key)
        if name in tensors:
            raise InputError(f"{folder}: there are two tensors {name}, with and without 'model.'")
        tensors[name] = tensor
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not equal(head, tensors.setdefault("model.embed_tokens.weight", head)):
            raise InputError(
                f"{folder}: config.json ties the embeddings, but lm_head.weight differs from them"
            )
    return tensors


def check_tensors(folder: Path, tensors: dict[str, Tensor], model):
    """Refuse tensors that are missing, left over, misshapen or not made of finite numbers."""
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    for prefix, origin in WRAPPERS.items():
        if any(f".{prefix}" in f".{key}" for key in unexpected):
            raise InputError(
                f"{folder}: {unexpected[0]} has the prefix {prefix!r} of {origin}; save the model "
                "inside, or rename the tensors"
            )
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
        if not tensor.float().isfinite().all():
            raise InputError(f"{folder}: {key} holds numbers that are not finite")
