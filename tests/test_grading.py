"""Finding and comparing final answers: cases by hand, suites of ../shared/data, hostile text."""

import json
import time
from fractions import Fraction

import pytest
from conftest import ROOT

from data import load_questions
from support.flags import InputError
from tasks.algebra import Algebra, algebra
from tasks.exact import evaluate
from tasks.grading import (
    compare_answers,
    extract_answer,
    is_correct,
    needs_algebra,
    split_parts,
)
from tasks.notation import normalise

SHARED = ROOT.parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the files of ../shared/data")
algebraic = pytest.mark.skipif(not algebra.available(), reason="needs math-verify")


def rows(path):
    return [json.loads(line) for line in open(SHARED / path)]


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42} it is", "42"),
        (r"\boxed{a}, later \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"it is $\boxed 2$.", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed{open", None),
        (r"\boxed{1} and \boxed{open", "1"),
        ("Final Answer: 14/3", "14/3"),
        (r"The answer is $\boxed{7}$.", "7"),
        ("#### 3\nso the answer is below.", "3"),
        ("The answer is 5.\nNo: the answer is 4.", "4"),
        (r"\boxed{}", None),
        ("the boxed answer", None),
    ],
)
def test_extract_answer(text, answer):
    """Catches the wrong one of several statements, braces that do not close, and "no answer" taken
    for one."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "prediction, answer, same, stage",
    [
        (r"\dfrac{1}{2}", r"\frac12", True, "text"),
        (r"\left( 3, 4 \right)", "(3,4)", True, "text"),
        ("x = 5", "5", True, "text"),
        (r"10\%", "10", True, "text"),
        ("58 square units", "58", True, "text"),
        (r"90^\circ", "90", True, "text"),
        (r"\text{Evelyn}", "evelyn", True, "text"),
        (r"3\frac{1}{2}", "3.5", True, "number"),
        (r"2\cdot 3/4", r"\frac{3}{2}", True, "number"),
        ("-(2^3)", "-8", True, "number"),
        ("50%", "1/2", False, "number"),
        ("0.3333", "1/3", False, "number"),
        ("1,234/2", "617", True, "number"),
        ("(1, 0.5)", r"(1,\frac{1}{2})", True, "number"),
        ("(2,1)", "(1,2)", False, "number"),
        ("[1,2]", "(1,2)", False, "text"),
        ("(1,2,3)", "(1,2)", False, "text"),
        ("2, 1", "1, 2", False, "number"),
        ("true", "false", False, "text"),
        ("10 or 12", "10", False, "text"),
        ("", "0", False, "none"),
        (None, "0", False, "none"),
        ("2^-1", "2", False, "number"),
        ("2^{-1}", "0.5", True, "number"),
    ],
)
def test_compare_answers(prediction, answer, same, stage):
    """Catches equal answers called different and different ones called equal, and the rules on
    order, percent and rounding."""
    assert compare_answers(prediction, answer) == (same, stage)


DIFFERENT = r"""
digits over spaces | 2 3 = 23 ; 1 1/2 = 11/2 ; 4\ 5 = 45 ; 1 2 3 = 123 ; 1,2 = 1.2
letters, not units | 3xy = 3 ; 2pi = 2 ; 20xy = 20 ; 3m = 3 ; 3 m = 3 ; 5ab = 5cd ; 2x = 2
letters, not units | 3 squared = 3
other measures | 5 million = 5 ; 3 fifths = 3 ; 3 hours 20 minutes = 3 ; 3 feet 2 inches = 3
other measures | 50 cents = 0.5
bases | 101_2 = 101_3 ; 101_2 = 101 ; 205_5 = 204_5
tiny and large | 1/2^{98} = 1/2^{99} ; \frac{1}{2006!} = \frac{1}{2004!} ; 10^{101} = 10^{100}
series | 1+1/2+\ldots = 1+1/3+\ldots
rounded | 0.333 = 1/3 ; 2\pi = 6.2831853 ; \sqrt{2} = 1.41421356
order and brackets | (1,2) = (2,1) ; [1,2] = (1,2) ; 2,1 = 1,2 ; \{1,1,2\} = \{1,2,2\}
parts | 5 or 6 = 5 ; 5 = 5, 6 ; \pm 3 = 3 ; (1,2),(3,4) = (1,2),(3,5)
matrices | \begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}1&2\end{pmatrix}
determinants | \begin{vmatrix}1&2\\3&4\end{vmatrix} = \begin{pmatrix}1&2\\3&4\end{pmatrix}
choices | (B) A = A ; A = B
times of day | 3:00 p.m. = 3:00 a.m. ; 12:00 = 12
branches | \sqrt{x^2} = x ; |x| = x
bounds | 3<x<5 :: [3,5] ; x\ge 2 :: (2,\infty) ; x \leq 3 :: x < 3
variables | x=5 :: y=5 ; \sin(x)=1 :: \cos(x)=1
equations | 2x+3=7 :: 7 ; a^2+b=0 :: 0 ; 7=11a+c :: 11a+c
single brackets | [5] = 5
capitals | 2\gamma = 2\Gamma ; 2I = 2i ; n = N
capitals | R^2-r^2 = 0 ; \frac{M}{M+m} = \frac{m}{M+m} ; \Delta = \delta ; AB+1 = ab+1 ; n+1 = N+1
commas of lists | (0,100) = 100 ; (-1,200) = -1200 ; 2, 100 = 2100 ; 3,100 = (3,100)
commas of lists | 010,10 = 10,010 ; x=1,200 :: x=1, y=200
side by side | 2 3 = 5 ; 5{6} = 11 ; {2}{3} = 5 ; [2][3] = 5 ; 2\quad 3 = 5 ; 1. 18 = 1.18
side by side | 5%10 = 510 ; 2°94 = 294
unknown signs | 2⅓ = 2⅔ ; 1⁄2 = 1 ; 10⁻³ = 10⁻⁴ ; 2ⁿ = 2 ; 2∛3 = 2 ; 0x1F = 0x2F ; 5→6 = 5
unknown signs | 5'6" = 56 ; 5‰ = 5
unknown signs | 5\bmod 3 = 5 ; 5\to 6 = 5 ; 3\oplus4 = 3 ; 3#4 = 3 ; 5+ = 5 ; 5\times = 5
unknown signs | 3\mid n = 3 ; 3，4 = 3 ; 5个 = 5
dots | 2+4+…+10 = 2+4+…+12 ; 3.14… = 3.14 ; 1,2,3,... = 1,2,3 ; 0.333... = 0.333
recurring | 0.\overline{3} = 0.\overline{4} ; 0.\overline{3} = 0.3
constants | 3+2\mathrm{i} = 5 ; 2\text{e} = 2 ; 5\mathrm x = 5
functions | 2 arctan x = 2 ; 3 sinx = 3 ; 2sinxcosx = 2 ; 2costheta = 2 ; 2 alpha = 2 ; 1/cosx = 1
functions | 1/xyz = 1 ; \sin h = \sinh
products | 2mg = 2 ; \frac32mg = \frac32 ; 2\pi hr = 2\pi ; \triangle ABC = \triangle ABD
changing words | 3 factorial = 3 ; 5 minus x = 5 ; 3 quadrillion = 3 ; 3 millionths = 3
changing words | 5\text{ or more} = 5 ; 3 tenths = 3
opposites | 5% increase = 5% decrease ; 5 more = 5 fewer ; 5 miles north = 5 miles south
opposites | 5 (if n even) = 5 (if n odd)
other units | $5 = 5 cents
other units | 60 miles per hour = 60 miles per minute ; 9 cm^2 = 9 cm^3 ; 5 dozen = 5 pairs
other units | 3 feet x = 3 ; 2 hours = 2 minutes ; 5 dollars = 5 cents ; 30° = 30 radians
other units | \sin 10^\circ = \sin 10
ratios | 12:30 p.m. = 12:30 a.m. ; 9 a.m. = 9 p.m. ; 12:30 = 2:5 ; 6:30 = 0.2 ; 1:2:3 = 1:3:2
letters as choices | (x)(x+1) = x ; (a)(b) = a ; a:b = a
other names | AB=5 :: BC=5 ; x_1=5 :: x_2=5 ; f(1)=5 :: f(2)=5 ; \alpha=5 :: \beta=5
other names | (x,y)=(1,2) :: (y,x)=(1,2)
other names | y'=2x :: y=2x ; f'(x) :: f(x) ; xy=0 :: x=0 ; x=y=1 :: x=z=1
chains | -\frac23\approx0.67 :: \frac23\approx0.67 ; 2+2=5 :: 5 ; xy+z=0.33333333 :: xy+z=\frac13
sets | \{x: x>1\} :: \{x: x<1\} ; \{\emptyset\} = \emptyset ; 717 \cup (8,9) = 717
powers | 2^{3}5^{2} = 2^{35} ; \pm1\pm2 = \pm3 ; 2e-3 = 0.002
"""
EQUAL = r"""
numbers | 1 1/2 = 3/2 ; -3 1/2 = -3.5 ; 1 000 = 1000 ; 1{,}000 = 1000 ; 1\,000 = 1000 ; 1e3 = 1000
scales and powers | 5 million = 5000000 ; 1.2\times10^{5} = 120000
scales and powers | 2^{100} = 1267650600228229401496703205376
products | 2^6 3^5 = 2^6\cdot 3^5 ; 2(3) = 6 ; 7! = 5040
units | 10 cm^2 = 10 ; 10cm = 10 ; 60 miles per hour = 60 ; 9 (apples) = 9 ; 7 dozen eggs = 7
units | 3/4 cup = 0.75
signs | 45° = 45 ; 32^\circ F = 32 ; €5 = 5 ; £5.50 = 5.5 ; −5 = -5 ; 3 × 4 = 12 ; √2 = \sqrt{2}
signs | x² = x^2
lists | 1 and 2 = 1,2 ; 1; 2 = 1,2 ; 21,16 or 11 = 21,16,11 ; 16\text{ and }17 = 16,17
plus and minus | \pm 2 = 2,-2 ; \pm 2 = -2,2 ; 2\pm\sqrt{3} = 2-\sqrt{3},2+\sqrt{3}
sets | \{3,1\} = \{1,3\} ; \{2, 1\} = 1;2
tuples | (1,2),(3,4) = (1,2), (3,4) ; (1, 0.5) = (1,1/2)
matrices | \begin{bmatrix}1&0.5\\2&3\end{bmatrix} = \begin{pmatrix} 1 & 1/2 \\ 2 & 3 \end{pmatrix}
matrices | \begin{pmatrix}1\\2\end{pmatrix} = \left(\begin{array}{c}1\\2\end{array}\right)
choices | (A) = A ; A) = a ; \textbf{(A)} = (A) ; (C) 5 apples = C ; \text{(C)} = \text{C}
times of day | 3:00 pm = 3:00\text{ p.m.}
names | x=5 :: 5 ; 5 :: k=5 ; f(3)=5 :: 5 ; a_1=12 :: 12 ; (p,q)=(1,2) :: (1,2)
names | \text{Area}=12 :: 12
relations | x\in[0.5,\infty) :: [1/2,\infty) ; x=2+3=5 :: 5 ; x\approx 11 :: 11 ; \log_2(8)=3 :: 3
lists of names | x=1, y=2 :: 1,2 ; x=3 or x=-2 :: 3,-2 ; n=1,2,3 :: 1,2,3
infinity | (1,+\infty) = (1,\infty) ; +\infty = \infty
exact and rounded | x=2\sqrt3\approx3.46 :: 2\sqrt3 ; 10\pi ≈ 31.4 :: 10\pi
exact and rounded | \frac23\approx0.667 :: 2/3
imaginary unit | 3+2\mathrm{i} = 3+2i
words like functions | 5 seconds = 5 ; 5 logs = 5 ; 5 expenses = 5 ; 5 tangerines = 5
notes | 5 (km) = 5 ; 12 (cm^2) = 12 ; 50 (%) = 50 ; 8 (miles/hour) = 8
sums | $15 per hour = 15 dollars per hour
compound units | 5 m/s = 5 ; 5 m^2 = 5 ; -30 \mathrm{~m} / \mathrm{s} = -30 ; \$18 per day = 18
compound units | 10weeks = 10 ; 2 hr = 2 hours
choices | (D) none of the above = D ; Option A = A
condition on a line | approximately 18 = 18 ; 18; = 18 ; `5` = 5 ; José = josé
lists without spaces | 100, 200 = 100,200 ; 45°, 135° = 45,135 ; (20,100) = (20, 100)
assignments | x=1,y=2 :: y=2,x=1
functions | sin(x) = \sin(x) ; x**2 = x^2 ; 2**10 = 1024
recurring | 0.\overline3 = 1/3 ; 0.1\overline6 = 1/6
Unicode | ⅓ = 1/3 ; 2⅓ = 7/3 ; 10⁻³ = 0.001 ; x¹² = x^{12} ; 101₂ = 101_2
fractions without braces | \frac{\sqrt6}3 = \frac{\sqrt{6}}{3} ; \frac12 = \frac{1}{2}
products | 2^{3}5^{2} = 2^3\cdot 5^2
thousands | \frac{\mathrm{1,000}}{2} = 500 ; 1,234/2 = 617 ; $x=1,200$ :: 1200
sizes | \bigl(1,2\bigr) = (1,2) ; \langle1,2\rangle = \langle 1, 2\rangle
"""
BY_ALGEBRA = r"""
intervals | 3<x<5 :: (3,5) ; 3\le x<5 :: [3,5) ; x>2 :: (2,\infty) ; 2<x :: x>2
intervals | m\in[\sqrt{2},+\infty) :: m\ge\sqrt{2}
equations | 2x+y=3 :: y=3-2x ; x^2+y^2=1 :: x^2=1-y^2
expressions | 1+2i :: i(2-i) ; x^{1/2} :: \sqrt{x} ; \frac{x}{2} :: 0.5x
expressions | \sec x :: \frac{1}{\cos x}
conditions | x<-1 or x>2 :: (-\infty,-1)\cup(2,\infty) ; x>-1 and x<2 :: (-1,2)
conditions | \{x\mid x>1\} :: (1,\infty) ; 3 \le x :: [3,\infty)
unions | (1,2]\cup[2,3) :: (1,3)
products of letters | abc+1 :: 1+abc ; \frac{GMm}{r^2} :: G\frac{Mm}{r^2} ; 2 \cdot s :: 2s
degrees | \sin 30^\circ :: 1/2 ; \cos20° :: \sin70°
sums | m+h :: h+m ; s-h :: -h+s
signs | 1\pm i :: 1+i,1-i
"""
STATED = r"""
The answer is 72, which is the total. -> 72
The answer is $18$, since it is. -> 18
so it is **73**. -> None
The answer is **73** -> 73
#### 7 dozen eggs -> 7
#### $25,000/year -> $25,000
#### -10°F -> -10
Final Answer: The final answer is $(3, 4)$. I hope it is correct. -> (3, 4)
FINAL ANSWER: 18 -> 18
The final answer is:\n\[ 18 \] -> 18
#### Final Answer\n\n18 -> 18
#### Step 2\nWe add 3 and 4. -> None
**Final Answer: $18** -> $18
\boxed{3}, \boxed{5}, \boxed{7} -> 3,5,7
\boxed{3}. So \boxed{5} -> 5
The answer is $x=5$ and $y=6$. -> x=5 and y=6
The answer is 5 and 6. -> 5 and 6
The answer is 3x + 2. -> 3x + 2
The answer is 3 1/2 cups -> 3 1/2
The answer is 12:30 p.m. -> 12:30 p.m
the answer is true. -> true
#### 30. Jeff walks 30 miles -> 30
Answer: (B) -> (B)
The answer is 2 sqrt(3). -> 2 sqrt(3)
the answer is about 5 miles -> 5
The answer is 8 - 3 = 5. -> 8 - 3 = 5
#### 118 000 -> 118 000
The answer is 7. We verify that the answer is correct. -> 7
It is \boxed{7}\n#### Summary\nWe added. -> 7
#### Answer: 5 -> 5
#### Answer\n5 -> 5
##### Note\nThe answer is 5. -> 5
Answer:\n5 -> 5
<answer>5</answer> -> 5
<think>\boxed{3}</think> The answer is 5 -> 5
The correct answer is (C) -> (C)
The answer is simply 5 -> 5
#### 5 seconds in total -> 5
The answer is a = 5 -> a = 5
The answer is A and B -> A and B
Answer: Not enough information -> Not enough information
#### Yes\nfoo -> Yes
#### B\nbecause of it -> B
#### 1. Compute\nWe add. -> None
The answer is =*\u00a0* -> None
The answer is option (C) -> (C)
The answer is:\n- 5 -> 5
The answers are $5$, $6$, and $7$. -> 5, 6, and 7
The answer is 3 - sqrt(2) -> 3 - sqrt(2)
The answer is 24_8 -> 24_8
The answer is 5/x -> 5/x
The answer is 5 (x + 1) -> 5 (x + 1)
The answer is 2**10 -> 2**10
The answer is 5, x -> 5, x
The answer is 0 and pi -> 0 and pi
The answer is 5 out of 8 -> 5 out of 8
The answer is 5 hours 30 minutes -> 5 hours 30 minutes
The answer is 5 hundred -> 5 hundred
The answer is $5$ to $6$ -> $5$ to $6$
The answer is 5! = 120 -> 5! = 120
\boxed -5 -> -5
\boxed\n{5} -> 5
\boxed{3}\text{, }\boxed{4} -> 3,4
"""


def pairs_of(text: str) -> list[tuple[str, str, str]]:
    """(kind, answer, other answer) of each case of a table; "::" stands between those with "="."""
    found = []
    for line in text.strip().splitlines():
        kind, _, cases = line.partition(" | ")
        for case in cases.split(" ; "):
            left, _, right = case.partition(" :: " if "::" in case else " = ")
            found.append((kind.strip(), left.strip(), right.strip()))
    return found


@pytest.mark.parametrize("kind, left, right", pairs_of(DIFFERENT))
def test_wrong_answers_are_wrong(kind, left, right):
    """Catches wrong answers that are called right, which is the worst that a grader can do."""
    assert not is_correct(left, right) and not is_correct(right, left), kind


@pytest.mark.parametrize("kind, left, right", pairs_of(EQUAL))
def test_equal_answers_without_algebra(monkeypatch, kind, left, right):
    """Catches ways of writing an answer that count as another answer."""
    monkeypatch.setattr(Algebra, "available", staticmethod(lambda: False))
    assert is_correct(left, right) and is_correct(right, left), (kind, normalise(left))


@algebraic
@pytest.mark.parametrize("kind, left, right", pairs_of(BY_ALGEBRA))
def test_equal_answers_by_algebra(kind, left, right):
    """Catches what math-verify alone calls different, or calls equal in one direction only."""
    assert is_correct(left, right) and is_correct(right, left), kind


@pytest.mark.parametrize("case", STATED.strip().splitlines())
def test_the_answer_is_cut_out_of_its_line(case):
    """Catches the sentence behind an answer taken for a part of it, and headings taken for one."""
    text, _, wanted = case.replace("\\n", "\n").replace("\\u00a0", "\u00a0").rpartition(" -> ")
    assert extract_answer(text) == (None if wanted == "None" else wanted)


@algebraic
@pytest.mark.parametrize(
    "prediction, answer, same",
    [
        (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+1", False),
        (r"2\pi", r"\pi", False),
        (r"(\sqrt{2}, 1)", r"(\frac{2}{\sqrt{2}},1)", True),
        (r"11z^{17}(11z^{17}+5)", r"11z^{17}(5+11z^{17})", True),
    ],
)
def test_algebra(prediction, answer, same):
    """Catches a worker that does not answer, or answers for another pair."""
    assert compare_answers(prediction, answer) == (same, "algebra")


@algebraic
def test_a_comparison_without_end_is_stopped():
    """Catches a grader that waits for algebra for ever, and a worker that is not there any more
    afterwards."""
    judge = Algebra()
    judge.start()
    begin = time.perf_counter()
    endless = (r"\prod_{k=1}^{5000}(x+k)", r"\prod_{k=0}^{4999}(x+1+k)")  # seconds of algebra
    assert judge.ask(*endless, 0.3) is False and judge.process is None
    assert time.perf_counter() - begin < 10
    assert judge.ask("x+1", "1+x", 30) is True and judge.ask("x+1", "1+x", 0) is False
    judge.process.kill()


def test_algebra_has_its_time_for_itself(monkeypatch):
    """Catches a worker whose start takes the time of its first comparison."""
    judge = Algebra()
    start = judge.start
    monkeypatch.setattr(judge, "start", lambda: judge.process or (time.sleep(1.5), start()))
    monkeypatch.setattr("tasks.grading.algebra", judge)
    assert is_correct("x+1", "1+x")
    judge.process.kill()


def test_missing_algebra_is_said_at_the_start(tmp_path, monkeypatch):
    """Catches answers that count as wrong because a package is missing."""
    monkeypatch.setattr(Algebra, "available", staticmethod(lambda: False))
    path = tmp_path / "hard.jsonl"
    path.write_text('{"question": "?", "answer": "3"}\n')
    load_questions(str(path))
    with open(path, "a") as file:
        file.write('{"question": "?", "answer": "\\\\sqrt{2}"}\n')
    with pytest.raises(InputError, match="1 answers, such as .*sqrt.* pip install math-verify"):
        load_questions(str(path))
    assert not needs_algebra("(1, 2)") and not needs_algebra("true")
    assert needs_algebra("x+1") and needs_algebra(r"(1,\sqrt2)")


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9",
        "9" * 10000,
        "(" * 100000,
        "{" * 100000 + "}" * 100000,
        "\\frac" * 20000,
        "1," * 50000,
        "-" * 100000,
        "\\boxed{" * 20000,
        "2^" * 1000 + "2",
        "1/0",
        "\x00\ud800",
        "\u202e12\u202c",
        "$" * 100000,
        "\\text{" * 9999,
        "9^64^9",
        "(9^64)^64",
        "1" + " " * 100000 + "2",
        "A" + " ." * 50000 + "!",
        "^" + " " * 100000,
        "\\boxed{1}" + " " * 100000 + "\\boxed{2}",
        "#### " * 20000,
        "the answer is " * 9999,
        "answer: " + "*_ " * 30000,
        "$" + "x" * 100000 + " $",
        "x=" * 50000,
        "(1,2)," * 20000,
        "\\pm" * 500,
        "\\begin{matrix}" * 50 + "&" * 300,
        "((((((1,2),3),4),5),6),7)",
        "{" * 450 + "," + "}" * 450,
    ],
)
def test_hostile_answers_are_quick(text):
    """Catches powers, nesting and patterns that take for ever, and tracebacks."""
    begin = time.perf_counter()
    extract_answer(text)
    extract_answer("#### " + text)
    split_parts(normalise(text))
    evaluate(normalise(text))
    is_correct(text, "12")
    assert time.perf_counter() - begin < 2


def value_of(text: str) -> Fraction | None:
    return evaluate(normalise(text))


def test_exact_numbers():
    """Catches floats on the way."""
    assert value_of("0.1+0.2") == Fraction(3, 10)
    assert value_of(r"\frac{1}{3}+\frac{1}{6}") == Fraction(1, 2)
    assert value_of("2^10") == 1024 and value_of("--3") == 3
    assert [value_of(text) for text in ("1.5.2", "2x", "2 3", "9^9^9")] == [None] * 4
    assert [value_of(text) for text in ("1e3", "2(3)", "5!", "2^100")] == [1000, 6, 120, 2**100]
    assert value_of(r"\sqrt{16}") == 4 and value_of(r"\sqrt{2}") is None


# cases of field.jsonl whose verdict is not the expected one, and why
DISAGREED = {190: "the file holds the words (100000 characters) in place of the answer"}
ALGEBRA_NEEDED = {18, 40, 44, 90, 116, 134, 146, 154, 182, 278, 284, 290, 296, 298, 444}


@shared
@pytest.mark.parametrize("installed", [pytest.param(True, marks=algebraic), False])
def test_cases_from_the_field(monkeypatch, installed):
    """Catches a case of 68 public threads and 14 test suites whose verdict changes."""
    if not installed:
        monkeypatch.setattr(Algebra, "available", staticmethod(lambda: False))
    wrong = set()
    for row in rows("answers/field.jsonl"):
        stated = extract_answer(row["text"]) if "text" in row else row["pred"]
        if row["kind"] == "extract":
            wrong |= set() if stated == row.get("expected") else {row["id"]}
            continue
        found = is_correct(stated, row["ref"])
        assert not (found and not row["expected"]), row
        wrong |= {row["id"]} if found != row["expected"] else set()
    assert wrong == DISAGREED.keys() | (set() if installed else ALGEBRA_NEEDED)


SUITES = "extract_boxed hendrycks_math mario_old math_gold_pairs reasoning_from_scratch".split()


@shared
@algebraic
def test_suites_of_answer_grading():
    """Agreement with three published suites and MATH's reference pairs: at least 90 %, no false
    "correct". The disagreements: an answer without a marked statement; one member of a set of
    solutions against the whole set."""
    different = []
    for name in SUITES:
        for number, row in enumerate(rows(f"answers/{name}.jsonl"), 1):
            if "text" in row:
                agree = extract_answer(row["text"]) == (row["expected"] and row["expected"].strip())
            else:
                references = row["ref"] if isinstance(row["ref"], list) else [row["ref"]]
                found = any(is_correct(row["pred"], reference) for reference in references)
                agree = found == row["expected"]
                assert not (found and not row["expected"]), row
            different += [] if agree else [(name, number)]
    assert different == [
        ("extract_boxed", 17),
        ("math_gold_pairs", 1),
        ("math_gold_pairs", 2),
        ("math_gold_pairs", 3),
        ("math_gold_pairs", 5),
    ]


@shared
def test_gsm8k_reference_answers():
    """Catches an answer of GSM8K's 8,792 that does not parse, differs from itself, or equals a
    neighbour's different one."""
    both = rows("gsm8k/train.jsonl") + rows("gsm8k/test.jsonl")
    found = [extract_answer(row["answer"]) for row in both]
    assert len(found) == 8792 and all(value_of(answer) is not None for answer in found)
    for answer, other in zip(found, found[1:]):
        assert is_correct(answer, answer)
        same = float(answer.replace(",", "")) == float(other.replace(",", ""))
        assert is_correct(answer, other) == same


@shared
def test_math_reference_answers():
    """Catches answers of MATH's 12,500 that are not found in their own solutions, or do not equal
    themselves."""
    both = rows("math/train.jsonl") + rows("math/test.jsonl")
    assert len(both) == 12500
    missed = []
    for row in both:
        if not is_correct(extract_answer(row["solution"]), row["answer"]):
            missed.append(row["unique_id"])
    # their reference is empty
    assert missed == ["train/number_theory/7115.json", "train/number_theory/7117.json"]


@shared
@algebraic
def test_gradings_are_quick():
    """5,000 gradings of MATH's test answers, each against itself and against the next question's,
    take under 15 s on an idle machine, worker and all; 60 s are allowed."""
    found = [row["answer"] for row in rows("math/test.jsonl")][:2500]
    begin = time.perf_counter()
    right = []
    for answer, other in zip(found, found[1:] + found[:1]):
        right.append(is_correct(answer, answer) + is_correct(answer, other))
    assert time.perf_counter() - begin < 60
    assert min(right) == 1 and right.count(2) < 100
