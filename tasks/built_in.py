"""The built-in tasks: what draws their questions, their splits, and the words that are tokens."""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from support.flags import InputError
from tasks import arithmetic, deduction

SPLITS = {  # split -> values of a byte, the first of the hash of a question
    "sft": range(0, 96),
    "search": range(96, 208),
    "valid": range(208, 224),
    "test": range(224, 256),
}


@dataclass(frozen=True)
class Task:
    """A built-in task.

    `draw(rng)` returns a question, its answer, and a function that writes a worked solution. Each
    of `words` is one token, beside end-of-text.
    """

    draw: Callable[[random.Random], tuple[str, str, Callable[[], str]]]
    words: list[str]


TASKS = {  # yours may be added
    "arithmetic": Task(arithmetic.draw, arithmetic.WORDS),
    "deduction": Task(deduction.draw, deduction.WORDS),
}


def is_built_in(spec: str) -> bool:
    """Whether --data names a built-in task, not a file."""
    return spec.split(":")[0] in TASKS


def split_of(text: str) -> str:
    """The split that owns a question. It depends on a hash of the text alone, so that the splits
    are disjoint for every seed and size."""
    first_byte = hashlib.sha256(text.encode()).digest()[0]
    return next(name for name, owned in SPLITS.items() if first_byte in owned)


def generate(name: str, split: str, count: int, seed: int) -> list[tuple]:
    """Draw `count` different questions of a split of a built-in task.

    Returns (id, question, answer, worked solution) of each; the solution is None except in split
    sft. InputError if there is no such split, or the task has fewer questions.
    """
    if split not in SPLITS:
        names = ", ".join(SPLITS)
        raise InputError(f"{name}:{split}: the splits of the built-in task are {names}")
    rng = random.Random(f"{split} {seed}")
    seen = set()
    rows = []
    vain = 0  # draws since the last new question
    while len(rows) < count:
        text, answer, work = TASKS[name].draw(rng)
        vain += 1
        if not isinstance(text, str) or not isinstance(answer, str):
            found = f"{type(text).__name__} and {type(answer).__name__}"
            raise InputError(
                f"task {name}: draw must return a question and an answer of type str, not {found}"
            )
        if vain > 200_000:
            raise InputError(
                f"{count} questions of split {split!r} are wanted, "
                f"but the built-in task {name} has only {len(rows)}"
            )
        if text in seen or split_of(text) != split:
            continue
        vain = 0
        solution = work()
        check_words(name, text, f"{text}\n{solution} #### {answer}")
        seen.add(text)
        identity = f"{split}-{seed}-{len(rows)}"
        rows.append((identity, text, answer, solution if split == "sft" else None))
    return rows


def check_words(name: str, question: str, text: str):
    """Refuse a text with letters that no word of the task covers."""
    left = re.sub(one_of(TASKS[name].words), "", text)
    if left:
        raise InputError(f"task {name}: none of its words covers {left[0]!r}, as in {question!r}")


def one_of(words: list[str]) -> str:
    """A pattern of any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A tokenizer in which each word is one token.

    Token 0 is <eos>, end-of-text; whatever no word covers becomes it, too.
    """
    ids = {word: index for index, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(one_of(words)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def task_tokenizer(name: str) -> Tokenizer:
    """The word tokenizer of a built-in task."""
    return word_tokenizer(TASKS[name].words)
