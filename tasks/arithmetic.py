"""The built-in task "arithmetic": order of operations.

Expressions of four whole numbers modulo 7 are reduced one operation a line. There are only 147
facts to know. The teacher who wrote the worked solutions knows them, but takes the operations in
random order. Search knows only the right answers, and has to find out that multiplication comes
first. Mistakes show in the text, and modulo a prime few of them end right by luck.
"""

import random
from collections.abc import Callable

MODULUS = 7
DIGITS = [str(number) for number in range(MODULUS)]
WORDS = ["\n", "+", "-", "*", "=", " -> ", " #### ", *DIGITS]  # the tokens


def first_operation(parts: list) -> int:
    """Index of the operator that comes first by the rules.

    It is the leftmost `*`, or the leftmost operator where there is no `*`. `parts` are the numbers
    and operators of an expression in turn, as in [3, "+", 2].
    """
    return parts.index("*") if "*" in parts else 1


def reduce_by(parts: list, choose: Callable[[list], int]) -> list[str]:
    """The lines of a solution, such as "2*3=6 -> 1+6" and "1+6=0 #### 0".

    At each step `choose(parts)` returns the index of the operator to apply.
    """
    lines = []
    while len(parts) > 1:
        index = choose(parts)
        left, operator, right = parts[index - 1 : index + 2]
        value = {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS
        parts = parts[: index - 1] + [value] + parts[index + 2 :]
        rest = "".join(map(str, parts))
        mark = " -> " if len(parts) > 1 else " #### "
        lines.append(f"{left}{operator}{right}={value}{mark}{rest}")
    return lines


def draw(rng: random.Random) -> tuple[str, str, Callable[[], str]]:
    """An expression, its value, and a function that writes a careless solution.

    The function draws from the same `rng`.
    """
    parts = [rng.randrange(1, MODULUS)]
    for _ in range(3):
        parts += [rng.choice("+-*"), rng.randrange(1, MODULUS)]
    answer = reduce_by(parts, first_operation)[-1].split("#### ")[1]

    def any_operation(left: list) -> int:
        return rng.randrange(1, len(left), 2)  # operators stand at odd places

    def careless() -> str:
        return "\n".join(reduce_by(parts, any_operation))

    return "".join(map(str, parts)), answer, careless
