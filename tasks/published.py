"""Published models and benchmarks: where their files are, the models' shapes, and what the rows mean."""
import os
import urllib.request
from pathlib import Path

from svpo import InputError
from tasks.grading import extract_answer

LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=32, head_dim=128, max_position_embeddings=2048)
PRESETS = {  # name -> (Hugging Face repository, the shape in its config.json, for plans); other names are folders or repositories
    "llama-7b": ("huggyllama/llama-7b", LLAMA),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", LLAMA | dict(max_position_embeddings=4096)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", LLAMA | dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8,
                                                             max_position_embeddings=131072)),
    "deepseekmath-7b": ("deepseek-ai/deepseek-math-7b-base", LLAMA | dict(vocab_size=102400, num_hidden_layers=30, max_position_embeddings=4096)),
    "qwen2.5-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True, model_type="qwen2")),
    "qwen2.5-math-7b": ("Qwen/Qwen2.5-Math-7B", dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        head_dim=128, max_position_embeddings=4096, model_type="qwen2")),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", dict(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)),
}

QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
BENCHMARKS = {  # name -> (its splits, the public address of a split's JSONL file); in --data-dir it is NAME/SPLIT.jsonl
    "gsm8k": (("train", "test"), "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"),
    "math": (("train", "test"), QWEN + "/math/{split}.jsonl"),
    "math500": (("test",), "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"),
    "svamp": (("test",), QWEN + "/svamp/test.jsonl"),
    "mawps": (("singleop", "addsub", "multiarith"), QWEN + "/mawps/{split}.jsonl"),
    "prontoqa": (("train", "test"), None),
}


def find_folder(name: str | Path, files: tuple = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """A local folder as it is; otherwise a preset or a repository id, downloaded with huggingface-hub."""
    if Path(name).is_dir():
        return Path(name)
    repository = PRESETS.get(str(name), (str(name),))[0]
    if str(name) not in PRESETS and (repository.count("/") != 1 or repository.startswith((".", "/", "~"))):
        raise InputError(f"{name}: no such folder, and not a preset ({', '.join(PRESETS)}) or repository id owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:  # network, authorisation, unknown repository: all end the same way for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no such folder, and downloading {repository} failed: {reason}")


def find_file(spec: str, data_dir: str) -> Path:
    """The JSONL file of `NAME` or `NAME:SPLIT` (the first split if not said): in `data_dir`, or downloaded once. Anything else is
    a path."""
    name, _, split = spec.partition(":")
    if name not in BENCHMARKS:
        return Path(spec)
    splits, address = BENCHMARKS[name]
    split = split or splits[0]
    if split not in splits:
        raise InputError(f"--data {spec}: the splits of {name} are {', '.join(splits)}")
    local = Path(data_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "svpo") / name / f"{split}.jsonl"
    if local.exists():
        return local
    if data_dir or not address:
        raise InputError(f"--data {spec}: {local} does not exist" + ("" if address else "; there is no public address for it, use --data-dir"))
    local.parent.mkdir(parents=True, exist_ok=True)
    aside = local.with_name(f"{local.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(address.format(split=split), timeout=60) as answer:
            aside.write_bytes(answer.read())
    except (OSError, ValueError) as error:
        raise InputError(f"--data {spec}: {address.format(split=split)} could not be read ({error}); put the file at {local}")
    os.replace(aside, local)
    return local


def number(value) -> str:
    """A number of JSON as it would be written."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def to_row(row: dict) -> dict | None:
    """The row as `question`, `answer` and where there are any `solution` and `id`; rows of unknown form stay as they are. None for
    those of MATH whose answer is empty (two of its training set)."""
    if isinstance(row.get("Body"), str) and isinstance(row.get("Question"), str):  # SVAMP
        return {"question": f"{row['Body'].strip().rstrip('.')}. {row['Question']}", "answer": number(row.get("Answer", "")),
                **({"id": row["ID"]} if "ID" in row else {})}
    if "input" in row and "target" in row:  # MAWPS
        return {"question": row["input"], "answer": number(row["target"])}
    if isinstance(row.get("problem"), str):  # MATH
        return None if row.get("answer") == "" else {**{key: row[key] for key in ("answer", "solution") if key in row}, "question": row["problem"],
                **({"id": row["unique_id"]} if "unique_id" in row else {})}
    if isinstance(row.get("answer"), list) and row["answer"] and isinstance(row["answer"][0], dict):  # ProntoQA
        chain = str(row["answer"][0].get("text", ""))
        return {"question": row.get("question"), "answer": extract_answer(chain) or "", "solution": chain}
    return row
