"""Algebra on final answers: the optional package math-verify, in a worker process of its own.

Run as a script, this file is the worker.
"""

import functools
import importlib.util
import json
import logging
import random
import re
import select
import subprocess
import sys

WORKER_MEMORY = 2**31  # bytes of address space
DIGITS = 40  # of values that are compared
GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|chi|"
    "psi|omega|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|hbar|ell"
)
COMMANDS = (
    "(?:arc)?(?:sin|cos|tan|sec|csc|cot)h?|log|ln|exp|sqrt|frac|binom|gcd|lcm|max|min|det|sum|prod|"
    "int|lim|to"
)
SIGNS = (
    "cdot|times|div|pm|le|ge|ne|infty|cup|cap|in|emptyset|setminus|mathbb|lfloor|rfloor|lceil|rceil"
)
KNOWN = re.compile(  # the signs that `read` accepts; no text begins with a group in braces
    rf"(?!{{)(?:\\(?:{GREEK}|{COMMANDS}|{SIGNS})(?![A-Za-z])|\\[{{}}]"
    r"|(?!0x)\d+(?:\.\d+)?(?![._{]| *\d)|[A-Za-z]|[-+*/^_=<>|!{}()\[,& ]|\](?!\[))*"
)


SUCH_THAT = re.compile(r"\\{[A-Za-z](?:\\mid|\||:)(.*)\\}")  # {x: x>1}


class Algebra:
    """math-verify in a worker process of at most 2 GiB.

    If a comparison takes too long, the worker is killed, and the answers count as unequal; the next
    comparison starts a new one.
    """

    def __init__(self):
        self.process = None
        self.known = {}  # (left, right) -> whether they are equal

    @staticmethod
    @functools.cache
    def available() -> bool:
        """Whether math-verify is installed."""
        return importlib.util.find_spec("math_verify") is not None

    def equal(self, left: str, right: str, seconds: float) -> bool:
        """Whether two normalised answers are equal; False if there is no verdict in `seconds`.

        What was found is kept, so that no pair has two verdicts.
        """
        if (left, right) not in self.known:
            self.known[left, right] = self.ask(left, right, seconds)
        return self.known[left, right]

    def ask(self, left: str, right: str, seconds: float) -> bool:
        """The worker's verdict on a pair; False if it gives none in time."""
        if seconds <= 0:
            return False
        self.start()
        try:
            self.process.stdin.write(json.dumps([left, right]) + "\n")
            self.process.stdin.flush()
            found = self.answer(seconds)
        except OSError:
            found = ""
        if not found:
            self.process.kill()
            self.process = None
        return found == "true\n"

    def start(self):
        """Start the worker if there is none, and wait up to a minute for its imports."""
        if self.process:
            return
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


def read(text: str):
    """An answer as an object of sympy; ValueError if any part of it is not understood.

    The parser is that of math-verify. It reads as far as it understands, so what it leaves is
    looked for. Letters keep their case. "or" and "and" join conditions.
    """
    import sympy
    from antlr4 import CommonTokenStream, InputStream, Token
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    for word, kind in (("or", sympy.Or), ("and", sympy.And)):
        parts = re.split(rf"(?<![A-Za-z\\]){word}(?![A-Za-z])", text)
        if len(parts) > 1:
            return kind(*map(read, parts))
    builder = SUCH_THAT.fullmatch(text)
    text = builder[1] if builder else text
    if not KNOWN.fullmatch(text):
        raise ValueError(f"{text!r} has signs that the parser does not know")
    tokens = CommonTokenStream(PSLexer(InputStream(text)))
    parser = PSParser(tokens)
    parser.removeErrorListeners()
    parser.math()
    if tokens.LA(1) != Token.EOF or parser.getNumberOfSyntaxErrors():
        raise ValueError(f"{text!r} is read in part only")
    config = ConversionConfig(lowercase_symbols=False)
    found = latex2sympy(text, normalization_config=None, conversion_config=config)
    if "I" in text and found.has(sympy.I):
        raise ValueError("the letter I is read as the imaginary unit")
    return found


def same(left, right) -> bool:
    """Whether two answers are equal, as `read` returns them.

    Values must agree to 35 digits; math-verify rounds to 6, so that 1/2^98 and 1/2^99 are both 0.
    Equations and inequalities are equal if one is a multiple of the other, an inequality is equal
    to the interval of its solutions. `i` is read as the imaginary unit where that makes values
    equal. Anything else is left to math-verify.
    """
    import sympy
    from math_verify import verify

    relation = sympy.core.relational.Relational
    pair = left, right
    if all(isinstance(one, sympy.Expr) for one in pair):
        found = ratio(left, right)
        if found not in (None, 1):
            letters = left.free_symbols | right.free_symbols
            imaginary = {one: sympy.I for one in letters if one.name == "i"}
            return bool(imaginary) and ratio(*(one.subs(imaginary) for one in pair)) == 1
        return found == 1 or bool(verify([right], [left], timeout_seconds=None))
    if all(isinstance(one, relation) for one in pair):
        kinds = {one.rel_op.replace(">", "<") for one in pair}
        sides = [(one.gts, one.lts) if hasattr(one, "gts") else one.args for one in pair]
        found = ratio(*(one - other for one, other in sides))
        if len(kinds) > 1 or found == 0:
            return False
        if found is None:
            gaps = [one - other for one, other in sides]
            return sympy.simplify(gaps[0] - gaps[1]) == 0
        return found > 0 or not kinds & {"<", "<="}
    if any(isinstance(one, sympy.Eq) for one in pair):
        return False
    condition = (relation, sympy.And, sympy.Or)
    if any(isinstance(one, condition) for one in pair):
        left, right = (one.as_set() if isinstance(one, condition) else one for one in pair)
        return left == right
    return bool(verify([right], [left], timeout_seconds=None))


def ratio(left, right):
    """left / right if it is the same number at four points, to 35 digits; constants have one.

    0 if it is not, None if the two have no values. It is 1 for expressions that are equal.
    """
    import sympy

    rng = random.Random(0)
    pair = []
    for one in (left, right):
        decimals = {number: sympy.Rational(str(number)) for number in one.atoms(sympy.Float)}
        pair.append(one.xreplace(decimals))
    symbols = sorted(pair[0].free_symbols | pair[1].free_symbols, key=str)
    found = []
    for _ in range(4 if symbols else 1):
        point = {
            one: rng.choice((1, -1)) * sympy.Rational(rng.randint(1, 99), 37) for one in symbols
        }
        values = [sympy.N(expression.subs(point), DIGITS) for expression in pair]
        if not all(value.is_number and value.is_finite for value in values):
            return None
        if values[0] == values[1]:  # 0 and 0, too
            found.append(sympy.Integer(1))
        elif 0 in values:
            return 0
        else:
            found.append(values[0] / values[1])
    near = sympy.Float(10) ** (5 - DIGITS)
    for value in (sympy.Integer(1), found[0]):
        if all(abs(one - value) <= near * abs(value) for one in found):
            return value
    return 0


def work():
    """The worker: reads a pair of answers a line, and writes true or false a line."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = WORKER_MEMORY if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    logging.disable(logging.CRITICAL)
    same(read("x+1"), read("1+x"))  # loads what the first comparison needs
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            pair = [read(text) for text in json.loads(line)]
            print(json.dumps(bool(same(*pair))), flush=True)
        except Exception:  # whatever the library trips over is not an equality
            print("false", flush=True)


algebra = Algebra()

if __name__ == "__main__":
    work()
