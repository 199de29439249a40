"""Exact values of rational expressions, as final answers are written."""

import math
import re
from fractions import Fraction

from tasks.notation import THOUSANDS

RECURRING = re.compile(r"(\d{1,9})\.(\d{0,9})\\overline\{?(\d{1,9})\}?")


def evaluate(text: str) -> Fraction | None:
    """Exact value of a rational expression in our notation; None for anything else.

    An expression has numbers, + - * / ^ !, brackets, \\frac, roots of squares and mixed numbers.
    """
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if not text or len(text) > 200:
        return None
    text = re.sub(r"\\(?:cdot|times|ast)(?![A-Za-z])", "*", text).replace("\\div", "/")
    text = re.sub(r"(?<![\d.]) | (?![\d.])", "", RECURRING.sub(recurring, text))
    tokens = re.findall(r"\d+(?:\.\d*)?|\\frac|\\sqrt|[-+*/^!(){}]|.", text)
    tokens.reverse()
    try:
        value = sum_of(tokens, 0)
    except (ValueError, ZeroDivisionError, OverflowError, IndexError):
        return None
    return None if tokens else value


def recurring(number: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, again = number.groups()
    below = (10 ** len(again) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + again) - int(whole + fixed)
    return f"(\\frac{{{above}}}{{{below}}})"


def sum_of(tokens: list[str], depth: int) -> Fraction:
    """The value of the sum that the expression begins with.

    Here and in `power` and `atom`, `tokens` is reversed, and what is read is taken off its end.
    `depth` counts the brackets around it. ValueError, ZeroDivisionError, OverflowError or
    IndexError where there is no such value.
    """
    value = Fraction(0)
    sign = 1
    while True:
        while tokens and tokens[-1] in "+-":
            sign = -sign if tokens.pop() == "-" else sign
        term = power(tokens, depth)
        while tokens and tokens[-1] in "*/(":
            operator = tokens[-1] if tokens[-1] == "(" else tokens.pop()  # 2(3)
            factor = power(tokens, depth)
            term = term / factor if operator == "/" else term * factor
        value += sign * term
        if not tokens or tokens[-1] not in "+-":
            return value
        sign = 1


def power(tokens: list[str], depth: int) -> Fraction:
    """The value of a factor, with its factorial and exponent where it has them."""
    base = atom(tokens, depth)
    if tokens and tokens[-1] == "!":
        tokens.pop()
        if base.denominator != 1 or not 0 <= base <= 3000:
            raise ValueError("not the factorial of a small number")
        base = Fraction(math.factorial(int(base)))
    if tokens and tokens[-1] == "^":
        tokens.pop()
        exponent = atom(tokens, depth)
        bits = max(abs(base.numerator), base.denominator).bit_length()
        # such as 9^9^9^9, which would take forever
        if exponent.denominator != 1 or bits * abs(exponent) > 20_000:
            raise ValueError("not a small whole power")
        base = base ** int(exponent)
    return base


def atom(tokens: list[str], depth: int) -> Fraction:
    """The value of a number, a fraction, a root, a mixed number or an expression in brackets."""
    token = tokens.pop()
    if depth > 30:
        raise ValueError("too deep")
    if token in "({":
        value = sum_of(tokens, depth + 1)
        if tokens.pop() != {"(": ")", "{": "}"}[token]:
            raise ValueError("brackets do not match")
        return value
    if token in ("\\frac", "\\sqrt"):
        if tokens[-1] != "{":
            raise ValueError(f"{token} needs braces")
        value = atom(tokens, depth)
        return value / atom(tokens, depth) if token == "\\frac" else root(value)
    value = Fraction(token)  # ValueError for anything that is not a number
    if tokens and tokens[-1] == "\\frac" and "." not in token:
        value += atom(tokens, depth)  # a mixed number
    return value


def root(value: Fraction) -> Fraction:
    """The square root of the square of a fraction; ValueError for other numbers."""
    found = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if found * found != value:
        raise ValueError("not a square")
    return found
