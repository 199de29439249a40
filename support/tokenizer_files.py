"""The tokenizer of a model's folder: tokenizer.json, and what ends a text."""

from pathlib import Path

from tokenizers import Tokenizer

from support.files import read_json
from support.flags import InputError


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
