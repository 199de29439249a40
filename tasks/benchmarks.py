"""Published benchmarks: where their files are, and what their rows mean."""
import os
import urllib.request
from pathlib import Path

from svpo import InputError
from tasks.grading import extract_answer

QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
BENCHMARKS = {  # name -> (its splits, the public address of a split's JSONL file); in --data-dir it is NAME/SPLIT.jsonl
    "gsm8k": (("train", "test"), "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"),
    "math": (("train", "test"), QWEN + "/math/{split}.jsonl"),
    "math500": (("test",), "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"),
    "svamp": (("test",), QWEN + "/svamp/test.jsonl"),
    "mawps": (("singleop", "addsub", "multiarith"), QWEN + "/mawps/{split}.jsonl"),
    "prontoqa": (("train", "test"), None),
}


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
