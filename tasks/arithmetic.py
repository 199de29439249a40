"""The built-in task: order of operations.

Expressions of four whole numbers modulo 7, reduced one operation a line. There are only 147 facts to know; the teacher who
wrote the worked solutions knows them but takes the operations in random order. Search knows only the right answers: that
multiplication comes first has to be found out. Mistakes show in the text; modulo a prime few end right by luck.
"""
import hashlib
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data import Question
from svpo import InputError

MODULUS = 7
SPLITS = {"sft": range(0, 96), "search": range(96, 208), "valid": range(208, 224), "test": range(224, 256)}
SPLIT_SIZE = {"sft": 13189, "search": 15365, "valid": 2094, "test": 4344}  # different expressions that each one owns


def split_of(text: str) -> str:
    """The split that owns this question: by a hash of its text, so the splits are disjoint for every seed and size."""
    return next(name for name, owned in SPLITS.items() if hashlib.sha256(text.encode()).digest()[0] in owned)


def first_operation(parts: list) -> int:
    """Index of the operator that comes first by the rules: the leftmost `*`, else the leftmost of all."""
    return parts.index("*") if "*" in parts else 1


def reduce_by(parts: list, choose) -> list[str]:
    """The solution lines when `choose(parts)` names the index of the operator to apply at each step."""
    lines = []
    while len(parts) > 1:
        index = choose(parts)
        left, operator, right = parts[index - 1:index + 2]
        value = {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS
        parts = parts[:index - 1] + [value] + parts[index + 2:]
        rest = "".join(map(str, parts))
        lines.append(f"{left}{operator}{right}={value}" + (f" -> {rest}" if len(parts) > 1 else f" #### {rest}"))
    return lines


def arithmetic_questions(split: str, count: int, seed: int) -> list[Question]:
    """`count` different questions of a split, drawn with `seed`: expressions of four numbers."""
    if split not in SPLITS:
        raise InputError(f"arithmetic:{split}: the splits of the built-in task are {', '.join(SPLITS)}")
    if count > SPLIT_SIZE[split]:
        raise InputError(f"{count} questions of split {split!r} are wanted, but the built-in task has only {SPLIT_SIZE[split]}")
    rng, seen, questions = random.Random(f"{split} {seed}"), set(), []
    while len(questions) < count:
        parts = [rng.randrange(1, MODULUS)]
        for _ in range(3):
            parts += [rng.choice("+-*"), rng.randrange(1, MODULUS)]
        text = "".join(map(str, parts))
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        answer = reduce_by(parts, first_operation)[-1].split("#### ")[1]
        careless = "\n".join(reduce_by(parts, lambda left: rng.randrange(1, len(left), 2)))
        solution = careless if split == "sft" else None
        questions.append(Question(f"{split}-{seed}-{len(questions)}", text, answer, solution))
    return questions


def arithmetic_tokenizer() -> Tokenizer:
    """Whole numbers, operators and marks are single tokens."""
    words = ["<eos>", "\n", "+", "-", "*", "=", " -> ", " #### "] + [str(number) for number in range(MODULUS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+| -> | #### |[-+*=\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer
