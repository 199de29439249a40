"""Final answers: finding one in a text, and deciding whether two are equal.

Three stages, the first that decides counts. (1) As text, after LaTeX that does not change the meaning is gone. (2) As exact
rational numbers, also element by element in tuples, intervals and lists; the order of elements counts, a percent sign is dropped
(10 % = 10, not 1/10), and 0.333 is not 1/3. (3) Algebra, where the right answer is not made of numbers or words, by the optional
package math-verify in a worker process of its own.
"""
import importlib.util
import json
import logging
import re
import select
import subprocess
import sys
from fractions import Fraction

MARK = re.compile(r"####|\\f?boxed\b|(?:[Tt]he (?:final )?answer is|[Ff]inal [Aa]nswer *:)")
PLAIN = re.compile(r"[A-Za-z][A-Za-z .'-]*")  # words alone
PROSE = re.compile(r"(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|ln|pi)[A-Za-z]{3,}|(?<![\\A-Za-z])or(?![A-Za-z])")
SPACING = re.compile(r"\\(?:[!,;:> ]|left\b|right\b|displaystyle\b|q?quad\b)|[~\s]+|(?<![\\A-Za-z])\\$")
SIZED_FRACTION = re.compile(r"\\[dtc]frac")
ARGUMENT = re.compile(r"(\\frac|\\sqrt)(?![A-Za-z{\[])(\w|\\[A-Za-z]+)")
SECOND_ARGUMENT = re.compile(r"(\\frac\{[^{}]*\})(\w)")
WORDS = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
UNITS = re.compile(r"(?<=[\d})])(?:\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?|[A-Za-z]{2,}(?:/[A-Za-z]+)?)$")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def extract_answer(text: str) -> str | None:
    """What follows the last `####` or `\\boxed`, or where there is neither, the last "The answer is" or "Final Answer:"; None where no
    answer is stated. Code (`<code>`) and what it printed (`<output>`) state none."""
    text = re.sub(r"<(code|output)>.*?(</\1>|\Z)", "", text, flags=re.DOTALL) if "<code>" in text or "<output>" in text else text
    marks = list(MARK.finditer(text))
    strong = [mark for mark in marks if mark[0][0] in "#\\"]
    for mark in (strong or marks)[:-20:-1]:
        rest = text[mark.end():]
        if mark[0][0] != "\\":
            return re.split(r"\n|</p>|</step>", rest, maxsplit=1)[0].strip(" :\t\r").rstrip(".").strip() or None
        rest = rest.lstrip(" \t")
        found = braced(rest) if rest.startswith("{") else (re.match(r"\d+", rest) or [None])[0]
        if found and found.strip():
            return found.strip().rstrip(".").strip() or None
    return None


def braced(text: str) -> str | None:
    """The inside of the braces that the text begins with; None where they do not close."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:index]
    return None


def normalise(answer: str) -> str:
    """The answer without what does not change its meaning: sizes, spaces, dollars, percent and degree signs, units."""
    text = answer.replace("\\\\", "\\").replace("\x0c", "\\f").replace("\t", "\\t").strip().strip("$").rstrip(".")
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        text = text.removeprefix(left).removesuffix(right)
    text = SIZED_FRACTION.sub(r"\\frac", text)
    text = re.sub(r"\\(?:\$|%)|[$%]|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", "", text)
    whole = WORDS.fullmatch(text.strip())
    text = whole[1] if whole else text
    if PLAIN.fullmatch(text.strip()):
        return " ".join(text.split()).lower()
    text = SPACING.sub("", text)
    text = UNITS.sub("", text)
    text = WORDS.sub(r"\1", text)
    text = SECOND_ARGUMENT.sub(r"\1{\2}", ARGUMENT.sub(r"\1{\2}", ARGUMENT.sub(r"\1{\2}", text)))
    text = re.sub(r"\^(-\w+)", r"^{\1}", re.sub(r"\^\{(\w)\}", r"^\1", text))
    text = re.sub(r"(?<![\d}])\.(?=\d)", "0.", text)
    return re.sub(r"^[A-Za-z]=(?!.*=)", "", text)


def to_number(text: str) -> Fraction | None:
    """Exact value of a rational expression (numbers, + - * / ^, brackets, \\frac, mixed numbers); None for anything else."""
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
    """The value of the longest sum at the end of `tokens` (reversed), and what is left."""
    value, sign = Fraction(0), 1
    while True:
        while tokens and tokens[-1] in "+-":
            sign = -sign if tokens.pop() == "-" else sign
        term = power(tokens, depth)
        while tokens and tokens[-1] in "*/":
            term = term * power(tokens, depth) if tokens.pop() == "*" else term / power(tokens, depth)
        value += sign * term
        if not tokens or tokens[-1] not in "+-":
            return value, tokens
        sign = 1


def power(tokens: list[str], depth: int) -> Fraction:
    base = atom(tokens, depth)
    if tokens and tokens[-1] == "^":
        tokens.pop()
        exponent = atom(tokens, depth)
        if exponent.denominator != 1 or abs(exponent) > 64 or max(abs(base.numerator), base.denominator) > 10**6:
            raise ValueError("not a small whole power")
        base = base ** int(exponent)
    return base


def atom(tokens: list[str], depth: int) -> Fraction:
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
    """Brackets and elements of a tuple, interval or list; one element with brackets "" for anything else."""
    inside, brackets = text, ""
    if len(text) > 2000:
        return "", [text]
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]":
        inside, brackets = text[1:-1], text[0] + text[-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        inside, brackets = text[2:-2], "{}"
    parts, depth = [""], 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return "", [text]
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return (brackets, parts) if len(parts) > 1 else ("", [text])


def grade(prediction: str | None, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and the stage that decided: none, text, number or algebra."""
    if prediction is None or not prediction.strip():
        return False, "none"
    left, right = normalise(prediction), normalise(answer)
    if left == right:
        return True, "text"
    values = to_number(prediction), to_number(answer)
    if None not in values:
        return values[0] == values[1], "number"
    (left_brackets, left_parts), (right_brackets, right_parts) = elements(left), elements(right)
    if len(left_parts) != len(right_parts) or left_brackets != right_brackets:
        return False, "text"
    if len(left_parts) > 1:
        found = [grade(*pair) for pair in zip(left_parts, right_parts)]
        return all(equal for equal, _ in found), max((stage for _, stage in found), key=("none", "text", "number", "algebra").index)
    if not left or is_text(left) or not needs_algebra(answer) or not algebra.available():
        return False, "text"
    return algebra.equal(left, right), "algebra"


def is_correct(prediction: str | None, answer: str) -> bool:
    """Whether a stated answer equals the right one; none is never correct."""
    return grade(prediction, answer)[0]


def is_text(answer: str) -> bool:
    """Whether an answer is words, not algebra."""
    return bool(PLAIN.fullmatch(answer) or PROSE.search(answer))


def needs_algebra(answer: str) -> bool:
    """Whether grading against this answer may need stage 3."""
    return any(to_number(part) is None and not is_text(part) for part in elements(normalise(answer))[1])


class Algebra:
    """math-verify in a worker process of at most 2 GiB: `limit` seconds a comparison, after which it is killed and started anew,
    and the answers count as unequal."""
    def __init__(self, limit: float = 1.5):
        self.limit, self.process, self.known = limit, None, {}

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("math_verify") is not None

    def equal(self, left: str, right: str) -> bool:
        if (left, right) not in self.known:
            self.known[left, right] = self.ask(left, right)
        return self.known[left, right]

    def ask(self, left: str, right: str) -> bool:
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, text=True)
            self.answer(60)  # it says when its imports are done
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

    def answer(self, limit: float) -> str:
        """The worker's next line; nothing where it does not come in time."""
        return self.process.stdout.readline() if select.select([self.process.stdout], [], [], limit)[0] else ""


def work():
    """The worker: a pair of answers a line in, true or false a line out."""
    import resource
    from math_verify import parse, verify
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (2**31 if hard == resource.RLIM_INFINITY else min(2**31, hard), hard))
    logging.disable(logging.CRITICAL)
    verify(parse("$x+1$"), parse("$1+x$"))  # what the first comparison loads
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
