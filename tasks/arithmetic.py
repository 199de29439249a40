"""The built-in task: order of operations.

Expressions of four whole numbers modulo 7, reduced one operation a line. There are only 147 facts to know; the teacher who
wrote the worked solutions knows them but takes the operations in random order. Search knows only the right answers: that
multiplication comes first has to be found out. Mistakes show in the text; modulo a prime few end right by luck.
"""
import random
from typing import Callable

MODULUS = 7
WORDS = ["\n", "+", "-", "*", "=", " -> ", " #### "] + [str(number) for number in range(MODULUS)]  # the tokens


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


def draw(rng: random.Random) -> tuple[str, str, Callable[[], str]]:
    """An expression, its value, and what writes a careless solution."""
    parts = [rng.randrange(1, MODULUS)]
    for _ in range(3):
        parts += [rng.choice("+-*"), rng.randrange(1, MODULUS)]
    answer = reduce_by(parts, first_operation)[-1].split("#### ")[1]
    return "".join(map(str, parts)), answer, lambda: "\n".join(reduce_by(parts, lambda left: rng.randrange(1, len(left), 2)))
