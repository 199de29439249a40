"""Final answers: finds the one that a text states, and decides whether two are equal.

There are three stages. The first that can decide counts.

1. Text, after LaTeX that does not change the meaning is gone.
2. Exact rational numbers, also element by element in tuples, intervals and lists. The order of
   elements counts, a percent sign is dropped (10 % = 10, not 1/10), and 0.333 is not 1/3.
3. Algebra, where the right answer is not made of numbers or words. The optional package
   math-verify does it, in a worker process of its own: this file, run as a script.
"""

import importlib.util
import json
import logging
import re
import select
import subprocess
import sys
from fractions import Fraction

STAGES = ("none", "text", "number", "algebra")  # what can decide, in order
WORKER_MEMORY = 2**31  # bytes of address space

# What stands before an answer, where one without braces ends, and what states none.
MARK = re.compile(r"####|\\f?boxed\b|(?:[Tt]he (?:final )?answer is|[Ff]inal [Aa]nswer *:)")
LINE_END = re.compile(r"\n|</p>|</step>")
CODE = re.compile(r"<(code|output)>.*?(</\1>|\Z)", re.DOTALL)

# Answers of words alone, and answers with words in them that are not functions.
PLAIN = re.compile(r"[A-Za-z][A-Za-z .'-]*")
PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|ln|pi)[A-Za-z]{3,}|(?<![\\A-Za-z])or(?![A-Za-z])"
)

# LaTeX that `normalise` removes or writes in one way.
SPACING = re.compile(
    r"\\(?:[!,;:> ]|left\b|right\b|displaystyle\b|q?quad\b)|[~\s]+|(?<![\\A-Za-z])\\$"
)
SIGNS = re.compile(r"\\(?:\$|%)|[$%]|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree")
SIZED_FRACTION = re.compile(r"\\[dtc]frac")
ARGUMENT = re.compile(r"(\\frac|\\sqrt)(?![A-Za-z{\[])(\w|\\[A-Za-z]+)")  # without braces
SECOND_ARGUMENT = re.compile(r"(\\frac\{[^{}]*\})(\w)")
WORDS = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
UNITS = re.compile(  # after a number or a bracket: \text{cm}^2, or letters such as km/h
    r"(?<=[\d})])(?:\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?|[A-Za-z]{2,}(?:/[A-Za-z]+)?)$"
)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def extract_answer(text: str) -> str | None:
    """The answer that a text states; None where it states none.

    It follows the last `####` or `\\boxed`. Where there is neither, it follows the last "The
    answer is" or "Final Answer:". Code (`<code>`) and what it printed (`<output>`) state none.
    """
    if "<code>" in text or "<output>" in text:
        text = CODE.sub("", text)
    marks = list(MARK.finditer(text))
    strong = [mark for mark in marks if mark[0][0] in "#\\"]
    for mark in (strong or marks)[:-20:-1]:  # the last one first, at most 19
        rest = text[mark.end() :]
        if mark[0][0] != "\\":
            line = LINE_END.split(rest, maxsplit=1)[0]
            return line.strip(" :\t\r").rstrip(".").strip() or None
        found = boxed(rest)
        if found and found.strip():
            return found.strip().rstrip(".").strip() or None
    return None


def boxed(rest: str) -> str | None:
    """The argument of `\\boxed`, with or without braces; `rest` is the text after it."""
    rest = rest.lstrip(" \t")
    if rest.startswith("{"):
        return braced(rest)
    digits = re.match(r"\d+", rest)
    return digits[0] if digits else None


def braced(text: str) -> str | None:
    """The inside of the braces that the text begins with; None where they do not close."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:index]
    return None


def normalise(answer: str) -> str:
    """The answer without what does not change its meaning.

    Sizes, spaces, dollars, percent and degree signs, and units are removed.
    """
    # Doubled backslashes, and \frac and \text whose backslash was read as an escape.
    text = answer.replace("\\\\", "\\").replace("\x0c", "\\f").replace("\t", "\\t")
    text = text.strip().strip("$").rstrip(".")
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        text = text.removeprefix(left).removesuffix(right)
    text = SIZED_FRACTION.sub(r"\\frac", text)
    text = SIGNS.sub("", text)
    whole = WORDS.fullmatch(text.strip())
    text = whole[1] if whole else text
    if PLAIN.fullmatch(text.strip()):
        return " ".join(text.split()).lower()
    text = SPACING.sub("", text)
    text = UNITS.sub("", text)
    text = WORDS.sub(r"\1", text)
    text = ARGUMENT.sub(r"\1{\2}", text)  # \frac12 is \frac{1}2,
    text = SECOND_ARGUMENT.sub(r"\1{\2}", text)  # and that is \frac{1}{2}
    text = re.sub(r"\^\{(\w)\}", r"^\1", text)  # ^{2} is ^2
    text = re.sub(r"\^(-\w+)", r"^{\1}", text)  # ^-1 is ^{-1}
    text = re.sub(r"(?<![\d}])\.(?=\d)", "0.", text)  # .5 is 0.5
    return re.sub(r"^[A-Za-z]=(?!.*=)", "", text)  # x=5 is 5


def to_number(text: str) -> Fraction | None:
    """Exact value of a rational expression; None for anything else.

    An expression has numbers, + - * / ^, brackets, \\frac and mixed numbers.
    """
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), normalise(text))
    if not text or len(text) > 200:
        return None
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\div", "/")
    tokens = re.findall(r"\d+(?:\.\d*)?|\\frac|[-+*/^(){}]|.", text)
    try:
        value, rest = total(tokens[::-1], 0)
    except (ValueError, ZeroDivisionError, OverflowError, IndexError):
        return None
    return None if rest else value


def total(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """The value of the longest sum at the end of `tokens`, and what is left.

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
        while tokens and tokens[-1] in "*/":
            if tokens.pop() == "*":
                term *= power(tokens, depth)
            else:
                term /= power(tokens, depth)
        value += sign * term
        if not tokens or tokens[-1] not in "+-":
            return value, tokens
        sign = 1


def power(tokens: list[str], depth: int) -> Fraction:
    """The value of a factor, with its exponent where it has one."""
    base = atom(tokens, depth)
    if tokens and tokens[-1] == "^":
        tokens.pop()
        exponent = atom(tokens, depth)
        whole = exponent.denominator == 1 and abs(exponent) <= 64
        small = max(abs(base.numerator), base.denominator) <= 10**6
        if not (whole and small):  # such as 9^9^9^9, which would take forever
            raise ValueError("not a small whole power")
        base = base ** int(exponent)
    return base


def atom(tokens: list[str], depth: int) -> Fraction:
    """The value of a number, a fraction, a mixed number or an expression in brackets."""
    token = tokens.pop()
    if depth > 30:
        raise ValueError("too deep")
    if token in "({":
        value, _ = total(tokens, depth + 1)
        if tokens.pop() != {"(": ")", "{": "}"}[token]:
            raise ValueError("brackets do not match")
        return value
    if token == "\\frac":
        if tokens[-1] != "{":
            raise ValueError("\\frac needs braces")
        return atom(tokens, depth) / atom(tokens, depth)
    value = Fraction(token)  # ValueError for anything that is not a number
    if tokens and tokens[-1] == "\\frac" and "." not in token:
        value += atom(tokens, depth)  # a mixed number
    return value


def elements(text: str) -> tuple[str, list[str]]:
    """Brackets and elements of a tuple, interval or list.

    Anything else is one element with brackets "".
    """
    if len(text) > 2000:
        return "", [text]
    inside = text
    brackets = ""
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]":
        inside = text[1:-1]
        brackets = text[0] + text[-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        inside = text[2:-2]
        brackets = "{}"
    parts = [""]
    depth = 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return "", [text]
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return (brackets, parts) if len(parts) > 1 else ("", [text])


def compare_answers(prediction: str | None, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and which of STAGES decided."""
    if prediction is None or not prediction.strip():
        return False, "none"
    left = normalise(prediction)
    right = normalise(answer)
    if left == right:
        return True, "text"
    values = to_number(prediction), to_number(answer)
    if None not in values:
        return values[0] == values[1], "number"
    left_brackets, left_parts = elements(left)
    right_brackets, right_parts = elements(right)
    if len(left_parts) != len(right_parts) or left_brackets != right_brackets:
        return False, "text"
    if len(left_parts) > 1:
        return compare_elements(left_parts, right_parts)
    if not left or is_text(left) or not needs_algebra(answer) or not algebra.available():
        return False, "text"
    return algebra.equal(left, right), "algebra"


def compare_elements(left_parts: list[str], right_parts: list[str]) -> tuple[bool, str]:
    """Whether all elements are equal in their order, and the latest stage that one of them took."""
    found = [compare_answers(left, right) for left, right in zip(left_parts, right_parts)]
    latest = max((stage for _, stage in found), key=STAGES.index)
    return all(equal for equal, _ in found), latest


def is_correct(prediction: str | None, answer: str) -> bool:
    """Whether a stated answer equals the right one. None is never correct."""
    return compare_answers(prediction, answer)[0]


def is_text(answer: str) -> bool:
    """Whether an answer is words, not algebra."""
    return bool(PLAIN.fullmatch(answer) or PROSE.search(answer))


def needs_algebra(answer: str) -> bool:
    """Whether grading against this answer may need stage 3."""
    _, parts = elements(normalise(answer))
    return any(to_number(part) is None and not is_text(part) for part in parts)


class Algebra:
    """math-verify in a worker process of at most 2 GiB.

    A comparison may take `limit` seconds. After that the worker is killed, the next comparison
    starts a new one, and the answers count as unequal.
    """

    def __init__(self, limit: float = 1.5):
        self.limit = limit
        self.process = None
        self.known = {}  # (left, right) -> whether they are equal

    @staticmethod
    def available() -> bool:
        """Whether math-verify is installed."""
        return importlib.util.find_spec("math_verify") is not None

    def equal(self, left: str, right: str) -> bool:
        """Whether two normalised answers are equal. Each pair is asked once."""
        if (left, right) not in self.known:
            self.known[left, right] = self.ask(left, right)
        return self.known[left, right]

    def ask(self, left: str, right: str) -> bool:
        """The worker's verdict on a pair; False where it gives none in time."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([left, right]) + "\n")
            self.process.stdin.flush()
            found = self.answer(self.limit)
        except OSError:
            found = ""
        if not found:
            self.process.kill()
            self.process = None
        return found == "true\n"

    def start(self):
        """Start the worker, and wait up to a minute for its imports."""
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answer(60)  # it says when its imports are done

    def answer(self, limit: float) -> str:
        """The worker's next line; "" where it does not come within `limit` seconds."""
        if not select.select([self.process.stdout], [], [], limit)[0]:
            return ""
        return self.process.stdout.readline()


def work():
    """The worker: reads a pair of answers a line, and writes true or false a line."""
    import resource

    from math_verify import parse, verify

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = WORKER_MEMORY if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    logging.disable(logging.CRITICAL)
    verify(parse("$x+1$"), parse("$1+x$"))  # loads what the first comparison needs
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            left, right = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            print(json.dumps(bool(verify(right, left, timeout_seconds=None))), flush=True)
        except Exception:  # whatever the library trips over is not an equality
            print("false", flush=True)


algebra = Algebra()

if __name__ == "__main__":
    work()
