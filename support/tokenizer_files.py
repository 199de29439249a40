"""The tokenizer of a model's folder: its tokens, and what ends a text.

The files are read as transformers reads them. tokenizer.json says how a text is cut and what is put
around it (its post-processor); add_bos_token and add_eos_token of tokenizer_config.json do not
count where there is a tokenizer.json.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from support.files import check_files, is_plain, json_object, read_file, read_json
from support.flags import PANIC, InputError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
SWITCHES = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
DEFAULTS = {  # tokenizer_class -> the special tokens that its settings need not name
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
UNLIMITED = 2**24  # the vocabulary of a folder without config.json
LONGEST = 100  # times that a text may grow before it is cut into tokens


def read_tokenizer(folder: Path, after_answer: str = "") -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the ids that end a text; the first of them is the one to be trained.

    Nothing is cut or padded, whatever tokenizer.json says. `after_answer` is what the chat template
    writes after an assistant's message (support.chat.answer_end); empty without --chat.
    """
    file = folder / "tokenizer.json"
    check_files(folder, [name for name in os.listdir(folder) if not name.endswith(".safetensors")])
    content = read_file(file)
    if b"Precompiled" in content:
        check_tables(json_object(content, str(file)), file)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise InputError(f"{file}: not a readable tokenizer ({error})")
    check_growth(tokenizer, file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_settings(folder)
    defaults = class_defaults(settings).items()
    known = {name: text for name, text in defaults if tokenizer.token_to_id(text) is not None}
    named = named_tokens(folder, known | settings)
    add_tokens(tokenizer, folder, settings, named)
    check_vocabulary(tokenizer, file, vocabulary_of(folder))
    check_bos(tokenizer, folder, settings, named.get("bos_token"))
    return tokenizer, find_ends(tokenizer, folder, named.get("eos_token"), after_answer)


def optional_json(file: Path) -> dict:
    """The JSON object in a file; an empty one if there is no such file."""
    return read_json(file) if is_plain(file) else {}


def vocabulary_of(folder: Path) -> int:
    """How many token ids the model has, by config.json."""
    vocabulary = optional_json(folder / "config.json").get("vocab_size", UNLIMITED)
    if type(vocabulary) is not int or vocabulary < 1:
        raise InputError(f"{folder / 'config.json'}: vocab_size must be a number, of 1 or more")
    return vocabulary


# ----------------------------------------------------------------------------- what a file asks for


def parts_of(value) -> Iterator[dict]:
    """The objects in a value of JSON that have a type, at any depth."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        yield value
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from parts_of(item)


def check_tables(settings: dict, file: Path):
    """Refuse a Precompiled normalizer that is shorter than it says: the library would abort."""
    for part in parts_of(settings.get("normalizer")):
        if part["type"] == "Precompiled":
            try:
                table = base64.b64decode(part["precompiled_charsmap"], validate=True)
            except (KeyError, TypeError, ValueError):
                table = b""
            if len(table) < 4 or int.from_bytes(table[:4], "little") > len(table) - 4:
                raise InputError(f"{file}: the table of its Precompiled normalizer is damaged")


def check_growth(tokenizer: Tokenizer, file: Path):
    """Refuse a tokenizer whose rules make a text more than LONGEST times as long."""
    growth = 1.0
    for stage in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        for part in parts_of(json.loads(stage.__getstate__()) if stage else {}):
            if part["type"] == "Replace":
                pattern = part["pattern"].get("String", "")  # a Regex may match nothing
                growth *= max(1, (len(part["content"]) + (not pattern)) / max(1, len(pattern)))
            elif part["type"] in ("Prepend", "Strip"):
                growth *= 1 + len(part.get("prepend", ""))
                growth = max(growth, part.get("start", 0), part.get("stop", 0))
    if growth > LONGEST:
        raise InputError(f"{file}: its rules make a text more than {LONGEST} times as long")


# ---------------------------------------------------------------------------------- special tokens


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json. Without added_tokens_decoder, special_tokens_map.json goes before."""
    settings = optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | optional_json(folder / "special_tokens_map.json")


def class_defaults(settings: dict) -> dict[str, str]:
    """The special tokens of the tokenizer's class in transformers."""
    return DEFAULTS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"), {})


def token_text(folder: Path, name: str, value) -> str:
    """The text of a token in the settings, which may be an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(
            f"{folder}: {name} of tokenizer_config.json or special_tokens_map.json is not a token: "
            f"{value!r}"
        )
    return text


def named_tokens(folder: Path, settings: dict) -> dict[str, str]:
    """The texts of the special tokens by their names: those of NAMES, and others in _token."""
    texts = {}
    for name, value in settings.items():
        own = name.endswith("_token") and isinstance(value, str)
        if own or name in NAMES and value is not None:
            texts[name] = token_text(folder, name, value)
    return texts


def added_token(text: str, switches: dict) -> AddedToken:
    """A token as the files describe it."""
    return AddedToken(text, **{name: switches[name] for name in SWITCHES if name in switches})


def add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict, named: dict[str, str]):
    """Add the tokens that do not stand in tokenizer.json but in the files beside it.

    That is added_tokens_decoder (without it, added_tokens.json), then the special tokens.
    """
    special = {text: settings.get(name) for name, text in named.items()}
    for name in LISTS:
        found = settings.get(name) or []
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise InputError(f"{folder}: {name} is not a list of tokens")
        special |= {token_text(folder, name, token): token for token in found}
    try:
        numbered = numbered_tokens(folder, settings, special)
        tokenizer.add_tokens([token for _, token in sorted(numbered.items())])
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        for text, token in special.items():
            if text and text not in known:
                switches = token if isinstance(token, dict) else {}
                tokenizer.add_tokens([added_token(text, switches | {"special": True})])
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{folder}: the added tokens cannot be read ({error})")
    for index, token in numbered.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise InputError(
                f"{folder}: token {token.content!r} has id {index} in tokenizer_config.json or "
                f"added_tokens.json, but {found} in tokenizer.json"
            )


def numbered_tokens(folder: Path, settings: dict, special: dict) -> dict[int, AddedToken]:
    """The tokens of added_tokens_decoder; without it, those of added_tokens.json."""
    if "added_tokens_decoder" in settings:
        entries = settings["added_tokens_decoder"].items()
        return {int(index): added_token(entry["content"], entry) for index, entry in entries}
    entries = optional_json(folder / "added_tokens.json").items()
    return {int(index): AddedToken(text, special=text in special) for text, index in entries}


def check_vocabulary(tokenizer: Tokenizer, file: Path, vocabulary: int):
    """Refuse the tokenizer of another model: more words than the model has ids.

    Added tokens may have higher ids: after fine-tuning there often is one more, for padding. They
    become special tokens, which the output of code cannot hold.
    """
    ids = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    outside = sorted(text for text, index in ids.items() if index >= vocabulary)
    if not ids or set(outside) - added:
        raise InputError(
            f"{file}: token ids up to {max(ids.values(), default=-1)}, but the model's vocabulary "
            f"has {vocabulary}"
        )
    if outside:
        texts = ", ".join(map(repr, outside[:3])) + (", ..." if outside[3:] else "")
        tokenizer.add_special_tokens(outside)
        print(f"{file}: the model has {vocabulary} token ids, none for {texts}; never written")


def check_bos(tokenizer: Tokenizer, folder: Path, settings: dict, bos: str | None):
    """Say so where add_bos_token is not what tokenizer.json does.

    transformers 5 follows tokenizer.json; the LLaMA tokenizer of transformers 4 follows
    add_bos_token, which it takes for true if it is not given.
    """
    llama = class_defaults(settings) is DEFAULTS["LlamaTokenizer"]
    wanted = settings.get("add_bos_token", True if llama else None)
    if not bos or type(wanted) is not bool:
        return
    first = tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(bos)]
    if first != wanted:
        given = "" if "add_bos_token" in settings else " by default"
        print(
            f"{folder}: tokenizer.json puts {'a' if first else 'no'} {bos!r} before a text, "
            f"add_bos_token is {str(wanted).lower()}{given}; tokenizer.json counts, as in "
            "transformers 5"
        )


# --------------------------------------------------------------------------------- what ends a text


def end_ids(value, vocabulary: int, file: Path) -> list[int]:
    """An `eos_token_id` of a file as a list; it may be a number, a list or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise InputError(
            f"{file}: eos_token_id must be a token id below {vocabulary} (vocab_size), or a list "
            f"of such, not {value!r}"
        )
    return ids


def find_ends(tokenizer: Tokenizer, folder: Path, eos: str | None, after_answer: str) -> list[int]:
    """The ids that end a text, the one to be trained first.

    That is the added token that the chat template writes after an answer, the tokenizer's
    eos_token, then the ids of generation_config.json, or of config.json if that has none.
    InputError if there are none; one line is printed if they do not agree.
    """
    vocabulary = vocabulary_of(folder)
    given = {}
    for name in ("generation_config.json", "config.json"):
        value = optional_json(folder / name).get("eos_token_id")
        given[name] = end_ids(value, vocabulary, folder / name)
    used = next((name for name, ids in given.items() if ids), "config.json")
    index = tokenizer.token_to_id(eos) if eos else None
    if index is not None and index >= vocabulary:
        print(
            f"{folder}: the model has no id for the tokenizer's eos_token {eos!r}; it ends no text"
        )
        index = None
    sources = {
        "the chat template": first_added(tokenizer, after_answer.lstrip(), vocabulary),
        "the tokenizer's eos_token": [] if index is None else [index],
        used: given[used],
    }
    ends = list(dict.fromkeys(token for ids in sources.values() for token in ids))
    if not ends:
        raise InputError(
            f"{folder}: nothing ends a text; no eos_token_id in generation_config.json or "
            "config.json, and no eos_token in tokenizer_config.json"
        )
    say_ends(tokenizer, folder, sources, ends, set(given["config.json"]) - set(ends))
    return ends


def first_added(tokenizer: Tokenizer, text: str, vocabulary: int) -> list[int]:
    """The added token that a text begins with, as a list; empty if it begins with none."""
    tokens = tokenizer.get_added_tokens_decoder().items()
    found = {token.content: index for index, token in tokens}
    first = max((word for word in found if text.startswith(word)), key=len, default="")
    return [found[first]] if first and found[first] < vocabulary else []


def say_ends(tokenizer: Tokenizer, folder: Path, sources: dict, ends: list[int], unused: set[int]):
    """One line if the last of `sources`, a file, lacks ids that the others name."""

    def texts(ids) -> str:
        return " ".join(repr(tokenizer.id_to_token(token) or token) for token in ids)

    *_, ids = sources.values()
    if not unused and (not ids or set(ends) == set(ids)):
        return
    parts = [f"{name}: {texts(found)}" for name, found in sources.items() if found]
    rest = f"; {texts(unused)} of config.json does not" if unused else ""
    print(
        f"{folder}: the files differ in what ends a text ({', '.join(parts)}); all of these end "
        f"it, {texts(ends[:1])} is trained{rest}"
    )
