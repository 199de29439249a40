"""Final answers: finds the one that a text states, and decides whether two are equal.

docs/grading.md has the rules. There are three stages; the first that can decide counts.

1. Text, after notation that does not change the meaning is gone.
2. Exact rational numbers, also element by element in tuples, intervals, lists, sets and matrices.
3. Algebra (tasks/algebra.py), for what is neither words nor numbers.
"""

import re
import time
from typing import NamedTuple

from tasks.algebra import SUCH_THAT, algebra
from tasks.exact import evaluate
from tasks.notation import (
    FUNCTION,
    LONGEST,
    NEXT_ROW,
    PLAIN,
    RELATION,
    THOUSANDS,
    changes,
    measure,
    normalise,
)

STAGES = ("none", "text", "number", "algebra")  # what can decide, in order
SECONDS = 1.2  # of algebra for a pair of answers, over all their elements

# ------------------------------------------------------------------------- finding a stated answer

# What stands before an answer: an argument follows \boxed, a line the others.
MARK = re.compile(
    r"^[ \t*_#>]*(?:final )?answer[ \t*_]*(?:[:：]|$)|(?<!#)#{4}(?!#)|\\(?:boxed|fbox)(?![A-Za-z])"
    r"|<answer>|\b(?:the|my|our) (?:final |correct |right )?(?:answers?|option|choice) (?:is|are)\b"
    r"|\bfinal answer\b(?: is\b)?",
    re.IGNORECASE | re.MULTILINE,
)
HEADING = re.compile(  # what makes #### a heading: its words, or a title that more text follows
    r"[ \t*_]*(?:step|part|case|solution|conclusion|explanation|problem|summary|check)\b"
    r"|[ \t*_]*\d+\. +[A-Z][^\n]*\n\s*\S"
    r"|(?![ \t*_]*(?:true|false|yes|no|[A-J])[ .*_]*\n)[^\n\d$\\]*\n\s*\S",
    re.IGNORECASE,
)
LINE_END = re.compile(r"\n|</p>|</step>|</answer>|<\|")
MARKS = 20  # the last marks of a text, those that are looked at
CLOSED = {  # a block with its end, by that end
    "</code>": re.compile(r"<code(?: [^<>]*)?>.*?</code>", re.DOTALL),
    "</output>": re.compile(r"<output(?: [^<>]*)?>.*?</output>", re.DOTALL),
}
CODE = re.compile(r"<(code|output)(?: [^<>]*)?>.*?(</\1>|\Z)", re.DOTALL)
BULLET = re.compile(r"\A(?:[-*•>]\s+|\d+\.\s+)+(?=\S)")
BETWEEN_BOXES = re.compile(r"[\s$*]*(?:[,;]|\\text\{ ?, ?\})(?:\s+and\b)?[\s$*]*")
FORMULA = re.compile(  # between its delimiters; a lone $ is a dollar
    r"\$\$(.{1,500}?)\$\$|\$(?!\s)([^$\n]{1,500}?)(?<!\s)\$(?!\d)"
    r"|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]",
    re.DOTALL,
)
BETWEEN_FORMULAS = re.compile(r"\s{0,9}(?:[,;](?:\s+(?:and|or)\b)?|\s(?:and|or)\b)\s{0,9}")
GOES_ON = re.compile(r"\s*(?:[-+*/=<>:^]|(?:to|times|or|out of|plus|minus|over)\b|[a-z]+ [$\d])")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0]\d{3})+(?![\d/])|\d+)"
NUMBER = re.compile(  # with a sign, a currency, a fraction, a percent sign and a scale
    rf"[-+−±]?\s?(?:\\?[$€£¥])?[-+−]?(?:{DIGITS}(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+|\s\d+/\d+)?(?:\s?\\?%)?(?:\s(?:hundred|thousand|million|billion|trillion)\b)?"
)
NEVER_PROSE = rf"(?!(?:{FUNCTION}|pi|theta|or|and)(?![a-z]))"
AFTER_NUMBER = re.compile(  # the sentence's end, a clause, a note, or a unit
    r"[.,;:!?]*(?:\*\*|__)?[.,;:!?]*$|(?:\*\*|__)[\s.,;:!?]|[.!?]\s+[A-Z]"
    rf"|[,;]\s+{NEVER_PROSE}[A-Za-z]{{2}}"
    rf"|\s\((?=[A-Za-z]{{2,}}[ )])|\s[—–-]\s{NEVER_PROSE}[A-Za-z]{{2}}"
    r"|°[CF]?(?:[\s.,]|$)|/(?:year|month|week|day|hour|hr|h|minute|min|second|s|person)\b"
)
WORDS_AFTER_NUMBER = re.compile(r"\s([A-Za-z][A-Za-z'-]*)(?:,? (?:and )?(\S+))?")
SHORT_PROSE = re.compile("an|in|of|is|as|at|by|if|on|[ckm]m|kg|ft|lb|[ap]m", re.IGNORECASE)
BEFORE = re.compile(  # words between "the answer is" and the answer
    r"\A(?:(?:therefore|thus|then|approximately|about|around|roughly|exactly|equal to|given by"
    r"|simply|just|now|actually|of course|the number|a total of|option|choice"
    r"|≈|=>|->|→|=|\.\.\.)[,:]?\s*)+",
    re.IGNORECASE,
)
JUDGEMENTS = {"correct", "incorrect", "wrong", "right", "valid", "reasonable", "unique", "known"}
ABOUT_IT = JUDGEMENTS | {  # how a sentence about the answer goes on after "the answer is"
    *("not", "the", "that", "what", "as", "also", "in", "found", "obtained", "verified"),
    *("based", "expected", "supported", "consistent", "clear", "positive", "negative", "unknown"),
}
SENTENCE_END = re.compile(r"(?<=[^\s.])[.!](?=\s+[A-Z])|,?\s(?=(?:because|since|which|where|so)\s)")


def extract_answer(text: str) -> str | None:
    """The answer that a text states; None where it states none.

    It follows the last `####` or `\\boxed`. Where there is neither, it follows the last "The answer
    is", "Final Answer", "Answer:" at the beginning of a line, or `<answer>`. Boxes joined by commas
    are a list. What a text says while it thinks (`<think>`), code (`<code>`) and what it printed
    (`<output>`) state none.
    """
    coded = "<code" in text or "<output" in text
    if coded:  # before thoughts are cut off: code may print or hold the end of one
        for end, block in CLOSED.items():
            place = text.rfind(end) + len(end)  # behind it, looking for an end takes long
            text = block.sub("", text[:place]) + text[place:]
    text = text.rpartition("</think>")[2]
    if coded:
        text = CODE.sub("", text)
    marks = list(MARK.finditer(text))[-2 * MARKS :]
    marks = [mark for mark in marks if not is_heading(mark, text)]
    strong = [mark for mark in marks if mark[0] == "####" or mark[0][0] == "\\"]
    return last_marked(text, strong) if strong else last_statement(text, marks)


def last_statement(text: str, marks: list[re.Match]) -> str | None:
    """The answer after the last phrase such as "the answer is"."""
    for mark in marks[: -MARKS - 1 : -1]:  # the last one first
        found = first_answer(text[mark.end() :], next_line=True)
        phrase = mark[0].lower().endswith((" is", " are"))
        if found and not (phrase and is_judgement(found)):
            return found
    return None


def last_marked(text: str, marks: list[re.Match]) -> str | None:
    """The answer after the last #### or in the last boxes, those that commas join."""
    boxes = []  # from right to left
    begin = 0  # of the leftmost of them
    for mark in marks[: -MARKS - 1 : -1]:  # the last one first
        rest = text[mark.end() :]
        if mark[0] == "####":
            return ",".join(reversed(boxes)) or first_answer(rest, next_line=False)
        found, length = boxed(rest)
        if not found:
            continue
        if boxes and not BETWEEN_BOXES.fullmatch(rest[length : begin - mark.end()]):
            break
        boxes.append(found)
        begin = mark.start()
    return ",".join(reversed(boxes)) or None


def is_heading(mark: re.Match, text: str) -> bool:
    """Whether a mark #### is that of a Markdown heading."""
    return mark[0] == "####" and bool(HEADING.match(text[mark.end() : mark.end() + LONGEST]))


def is_judgement(found: str) -> bool:
    """Whether what follows "the answer is" says something about the answer: "correct"."""
    first, *others = found.lower().split()
    return first.strip(",") in (ABOUT_IT if others else JUDGEMENTS)


def boxed(rest: str) -> tuple[str | None, int]:
    """The argument of `\\boxed`, with or without braces, and where it ends.

    `rest` is the text after `\\boxed`.
    """
    space = len(rest) - len(rest.lstrip())
    if rest[space : space + 1] == "{":
        inside = braced(rest[space:]) or ""
        return inside.strip().rstrip(".").strip() or None, space + len(inside) + 2
    digits = re.compile(r"-?\d+(?:\.\d+)?").match(rest, space)
    return (digits[0], digits.end()) if digits else (None, 0)


def braced(text: str) -> str | None:
    """The inside of the braces that the text begins with; None where they do not close."""
    depth = 0
    for found in re.finditer("[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[1 : found.start()]
    return None


def first_answer(rest: str, next_line: bool) -> str | None:
    """The first complete answer of the text after a mark, without the sentence behind it.

    With `next_line` it may stand on the next line that is not empty.
    """
    rest = rest[: 3 * LONGEST]
    here, _, below = rest.partition("\n")
    if next_line and not here.strip(" \t\r:：*_"):
        rest = BULLET.sub("", below.lstrip(), count=1)
    rest = BEFORE.sub("", rest.lstrip(" \t\r:：*_"), count=1)
    formula = formulas(rest)
    if formula:
        return formula
    line = LINE_END.split(rest, maxsplit=1)[0].strip()
    number = NUMBER.match(line)
    if number and is_prose(line[number.end() :]):
        line = number[0]
    else:
        end = SENTENCE_END.search(line)
        line = line[: end.start()] if end else line
    return line.strip("*_: \t").rstrip(".,;").strip("*_ \t").strip() or None


def formulas(rest: str) -> str:
    """The formula that a text begins with, and those that commas, "and" or "or" join to it.

    Empty if it begins with none, or if the sentence around it belongs to the answer.
    """
    formula = FORMULA.match(rest)
    found = ""
    end = 0
    while formula:
        found += next(filter(None, formula.groups())).strip()
        end = formula.end()
        link = BETWEEN_FORMULAS.match(rest, end)
        formula = link and FORMULA.match(rest, link.end())
        found += link[0] if formula else ""
    return "" if GOES_ON.match(rest, end) else found.rstrip(".")


def is_prose(tail: str) -> bool:
    """Whether the text after a number is a unit or prose, not part of a formula."""
    if AFTER_NUMBER.match(tail):
        return True
    words = WORDS_AFTER_NUMBER.match(tail)
    if not words:
        return False
    word, following = words[1], words[2] or ""
    if word == "and":  # "5 and 6" is a list, "5 and the rest is" is not
        return is_word(following)
    if changes(word) or re.match(r"[-+*/^=<>(\\]|[$]?\d", following):  # "5 hours 30 minutes"
        return False
    if word.lower() == "a":  # "5 a day"
        return bool(following)
    return len(word) > 2 or bool(SHORT_PROSE.fullmatch(word))


def is_word(text: str) -> bool:
    """Whether a text is a word of a sentence, not a part of a formula."""
    return bool(re.fullmatch(r"[A-Za-z]{2,}[.,]?", text)) and not changes(text.strip(".,"))


# ------------------------------------------------------------------------------------ whole answers

NAME = re.compile(r"\\?[A-Za-z][\\A-Za-z\d_'. ]*")  # without what stands in brackets
SUM_NAME = re.compile(r"[A-Za-z](?:[-+]?[A-Za-z])*|\|[A-Za-z]+\||\[[A-Z]{3,}\]")  # m+n
GROUP = re.compile(r"\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]")
APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
RELATION_SIGN = re.compile(r"=|\\approx(?![A-Za-z])|\\in(?![A-Za-z])")
BASED = re.compile(r"\(?(\d[0-9A-Fa-f]*)\)?_\{?(\d+)\}?")  # 101_2
MATRIX = re.compile(
    r"[(\[]?\\begin\{([bpvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}[)\]]?", re.DOTALL
)
CONDITION = re.compile(rf"{RELATION.pattern}|\\(?:cup|cap|setminus)(?![A-Za-z])")
COMMA, SEMICOLON, COLON = re.compile(","), re.compile(";"), re.compile(":")
PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
LETTER = re.compile(r"[$*(\s]*(?:\\text(?:bf)?\{)?[$*(\s]*([A-J])[)}.:$*\s]*")  # the right choice
LABELLED = re.compile(  # a choice with what it says: "(A) 21", "A. 21", "Option A"
    r"[$*(\s]*(?:\\text(?:bf)?\{)?[$*\s]*"
    r"(?:\(([A-J])\)|([A-J])[).:](?=\s)|(?:[Oo]ption|[Cc]hoice) ([A-J])\b)(?!\s*[-+*/^=(]).*"
)
DOTS = re.compile(r"\\[lc]?dots(?![A-Za-z])")
PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|ln|pi)[A-Za-z]{4,}"
    r"|(?<![\\A-Za-z])(?:the|not|for|all)(?![A-Za-z])"
)


def compare_answers(prediction: str | None, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and which of STAGES decided.

    "algebra" stands there, too, if it found nothing or its time was over.
    """
    if prediction is None or not prediction.strip():
        return False, "none"
    for one, other in ((prediction, answer), (answer, prediction)):
        choice, letter = LABELLED.fullmatch(one[:LONGEST]), LETTER.fullmatch(other[:50])
        if choice and letter:
            return letter[1] in choice.groups(), "text"
    measures = zip(measure(prediction[-60:]), measure(answer[-60:]))
    if any(one and other and one != other for one, other in measures):  # 2 hours and 2 minutes
        return False, "text"
    left, right = normalise(prediction), normalise(answer)
    name, equal, value = left.rpartition("=")
    if equal and SUM_NAME.fullmatch(name) and evaluate(right) is not None:  # m+n=33
        left = value
    if left != right and undecided(right) and algebra.available():
        algebra.start()  # before the clock runs
    return compare(left, right, time.monotonic() + SECONDS)


def is_correct(prediction: str | None, answer: str) -> bool:
    """Whether a stated answer equals the right one. None is never correct."""
    return compare_answers(prediction, answer)[0]


def compare(left: str, right: str, until: float, depth: int = 0) -> tuple[bool, str]:
    """`compare_answers` of normalised answers, `depth` lists inside others.

    `until` is the time of time.monotonic when algebra ends.
    """
    if left == right or max(len(left), len(right)) > LONGEST or depth > 5:
        return left == right, "text"
    whole = left, right
    left_name, left = split_name(left)
    right_name, right = split_name(right)
    if left_name and right_name and left_name != right_name:  # x=5 is not y=5
        return by_algebra(*whole, until)
    if left == right:
        return True, "text"
    values = evaluate(left), evaluate(right)
    if None not in values:
        return values[0] == values[1], "number"
    parts = split_parts(left), split_parts(right)
    sizes = [len(one.elements) for one in parts]
    if parts[0].brackets != parts[1].brackets or sizes[0] != sizes[1]:
        sets = CONDITION.search(left) or CONDITION.search(right)  # 3<x<5 is (3,5)
        return by_algebra(left, right, until) if sets else (False, "text")
    large = [text for text in (left, right) if THOUSANDS.fullmatch(text)]
    if large and (",0" in "".join(large) or not numeric(*parts)):
        return False, "text"  # 1,200 may be a list of numbers, but not x=1,y=200; 1,020 is no list
    if sizes[0] > 1:
        return compare_parts(*parts, until, depth)
    if (left, right) != (parts[0].elements[0], parts[1].elements[0]):  # without brackets
        return compare(parts[0].elements[0], parts[1].elements[0], until, depth + 1)
    if BASED.fullmatch(left) or BASED.fullmatch(right):
        return compare_bases(left, right), "text"
    if left[:1] == "[" or right[:1] == "[":  # [5] is no interval
        return False, "text"
    found = by_algebra(left, right, until)
    both = not found[0] and all("=" in text for text in whole) and whole != (left, right)
    return by_algebra(*whole, until) if both else found


def numeric(*parts: "Parts") -> bool:
    """Whether all elements of all parts are numbers."""
    return all(evaluate(element) is not None for one in parts for element in one.elements)


def by_algebra(left: str, right: str, until: float) -> tuple[bool, str]:
    """Stage 3, where it can decide; False if the time is over."""
    both = left + right
    undecidable = is_text(left) or is_text(right) or DOTS.search(both) or NEXT_ROW in both
    if not left or undecidable or not algebra.available():
        return False, "text"
    return algebra.equal(left, right, until - time.monotonic()), "algebra"


def split_name(text: str) -> tuple[str, str]:
    """The name that stands before the value of an answer, and the value.

    Only names (`x=5`, `f(3)=5`, `(p,q)=(1,2)`) and equal numbers (`2+3=5`) are split off. What
    follows `\\approx` is not the value if an exact one stands before it. An equation whose left
    side is an expression is a value as a whole.
    """
    exact, *rounded = split_outside(text, APPROXIMATELY)
    if rounded and not is_name(exact):
        text = exact
    *names, value = split_outside(text, RELATION_SIGN)
    number = evaluate(value)
    for name in names:
        if not is_name(name) and (number is None or evaluate(name) != number):
            return "", text
    names = [name for name in names if evaluate(name) is None]
    return ("=".join(names), value) if value else ("", text)


def is_name(text: str) -> bool:
    """Whether a text names a quantity: it has letters, and outside brackets no operator."""
    outside = text
    for _ in range(5):
        outside = GROUP.sub("", outside)
    if not outside:  # (p,q)
        return text[:1] == "(" and bool(re.fullmatch(r"[A-Za-z,_\d]+", text[1:-1]))
    if outside == "\\frac" and not re.search(r"[A-Za-z]", text[5:]):
        return False
    outside = outside.rpartition(":")[2]  # S_1:S=1:2
    return bool(NAME.fullmatch(outside)) and not re.match(r"\\(?:sqrt|sum|int|prod)", outside)


def split_outside(text: str, separator: re.Pattern) -> list[str]:
    """The pieces of a text between separators that stand in no brackets.

    The text as one piece if its brackets do not match.
    """
    pieces = []
    begin = depth = 0
    place = 0
    while place < len(text):
        found = separator.match(text, place) if depth == 0 else None
        if found:
            pieces.append(text[begin : found.start()])
            begin = place = found.end()
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth < 0:
            return [text]
        place += 1
    return [*pieces, text[begin:]]


class Parts(NamedTuple):
    """The elements of an answer. Lists and sets have no brackets, a matrix has its shape there."""

    brackets: str
    elements: list[str]
    ordered: bool = True


def split_parts(text: str) -> Parts:
    """The elements of a tuple, interval, list, ratio, set or matrix; a `\\pm` is two elements.

    Anything else is one element.
    """
    matrix = MATRIX.fullmatch(text)
    if matrix:
        kind = matrix[1] if matrix[1][0] in "vV" else "matrix"  # those are determinants and norms
        rows = [row.split("&") for row in matrix[2].rstrip(NEXT_ROW).split(NEXT_ROW)]
        return Parts(f"{kind} {[*map(len, rows)]}", [cell for row in rows for cell in row])
    elements = split_outside(text, SEMICOLON if ";" in text else COMMA)
    brackets = ""
    a_set = text.startswith("\\{") and text.endswith("\\}") and not SUCH_THAT.search(text)
    if len(elements) == 1 and (a_set or text and text[0] in "([" and text[-1] in ")]"):
        inside = text[2:-2] if a_set else text[1:-1]
        elements = split_outside(inside, SEMICOLON if ";" in inside else COMMA)
        if len(elements) > 1 and not a_set:
            brackets = text[0] + text[-1]
        elif text[0] == "[" or not balanced(inside) or inside == "\\emptyset":
            elements = [text]
    elif len(elements) == 1:
        elements = split_outside(text, COLON)
        brackets = ":" if len(elements) > 1 else ""
    signed = []
    for element in elements:
        signs = "+-" if len(PLUS_MINUS.findall(element)) == 1 else ""
        signed += [
            PLUS_MINUS.sub(sign, element).strip().lstrip("+").replace("+ ", "+").replace("- ", "-")
            for sign in signs
        ] or [element]
    return Parts(brackets, signed, ordered=not a_set and len(signed) == len(elements))


def balanced(text: str) -> bool:
    """Whether no bracket closes before it opens."""
    return split_outside(text + ",", COMMA) != [text + ","]


def compare_parts(left: Parts, right: Parts, until: float, depth: int) -> tuple[bool, str]:
    """Whether all elements are equal, and the latest stage that one of them took.

    In their order, unless one side is a set, or all have names: x=1,y=2.
    """
    waiting = list(right.elements)
    stages = []
    names = [sorted(split_name(element)[0] for element in one.elements) for one in (left, right)]
    ordered = left.ordered and right.ordered and not (all(names[0]) and names[0] == names[1])
    for element in left.elements:
        for place, other in enumerate(waiting[:1] if ordered else waiting):
            same, stage = compare(element, other, until, depth + 1)
            if left.brackets == ":" and stage == "algebra":  # 3:00pm
                same = False
            if same:
                waiting.pop(place)
                break
        stages.append(stage)
        if not same:
            return False, max(stages, key=STAGES.index)
    return True, max(stages, key=STAGES.index)


def compare_bases(left: str, right: str) -> bool:
    """Whether two numbers are the same digits in the same base.

    A number without a base never equals one with a base.
    """
    found = [BASED.fullmatch(text) for text in (left, right)]
    if None in found:
        return False
    return len({(one[1].lstrip("0"), one[2]) for one in found}) == 1


def is_text(answer: str) -> bool:
    """Whether an answer is words, not algebra."""
    return bool(PLAIN.fullmatch(answer) and len(answer) > 3 or PROSE.search(answer))


def needs_algebra(answer: str) -> bool:
    """Whether grading against this answer may need stage 3."""
    return undecided(normalise(answer))


def undecided(text: str) -> bool:
    """`needs_algebra` of a normalised answer."""
    if len(text) > LONGEST or PLAIN.fullmatch(text):
        return False
    elements = split_parts(split_name(text)[1]).elements
    return any(evaluate(split_name(one)[1]) is None and not is_text(one) for one in elements)
