"""Brings final answers to one notation: removes what does not change their meaning.

docs/grading.md has the rules. Letters that may be variables are never removed.
"""

import re

LONGEST = 1000  # characters of an answer; longer ones are left as they are
NEXT_ROW = "\0"  # of a matrix

SYMBOLS = {
    **dict.fromkeys("−–‐‑﹣", "-"),
    **dict.fromkeys("\u00a0\u202f\u2009\u3000", " "),
    **dict.fromkeys("$€£¥₹", " "),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("“”„«»`", '"'),
    **{chr(0xFF01 + place): chr(0x21 + place) for place in range(94)},  # of full width
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "÷": "\\div ",
    "±": "\\pm ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "π": "\\pi ",
    "θ": "\\theta ",
    "…": "\\ldots ",
    "⋯": "\\ldots ",
    "½": " \\frac{1}{2}",
    "⅓": " \\frac{1}{3}",
    "⅔": " \\frac{2}{3}",
    "¼": " \\frac{1}{4}",
    "¾": " \\frac{3}{4}",
    "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}",
    "\x0c": "\\f",  # \frac and \text whose backslash was read as an escape
    "\t": "\\t",
}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
TRIGONOMETRY = r"sin|cos|tan|sec|csc|cot"
FUNCTION = rf"(?:arc)?(?:{TRIGONOMETRY})h?|log|ln|exp|sqrt"
SPELLINGS = [  # what is written, and how we write it, one after the other
    (r"\.\.\.", r"\\ldots "),
    (r"√ ?(\d+|[A-Za-z])|√ ?\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (r"(?<![A-Za-z])\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"(?<![\\A-Za-z])({FUNCTION})(?=[ (_^\d\\])", r"\\\1"),
    (r"(?<![\\A-Za-z])(pi|infty|theta)(?![A-Za-z])", r"\\\1 "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\leq(?:slant)?(?![A-Za-z])|<=", r"\\le "),
    (r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"\\bigcup(?![A-Za-z])", r"\\cup "),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\varnothing|\\emptyset", r"\\emptyset "),
    (r"\\var(phi|epsilon|theta)", r"\\\1"),
    (r"\\mathbb ?([A-Z])", r"\\mathbb{\1}"),
    (r"\\l(?:brace|angle)(?![A-Za-z])", r"\\{"),
    (r"\\r(?:brace|angle)(?![A-Za-z])", r"\\}"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|large)(?![A-Za-z])", ""),
    (r"\{,\}|(?<=\d),?\\[!,] ?(?=\d{3})", ","),  # thousands
    (r"\\[!,;:> ]|\\q?quad(?![A-Za-z])|(?<![\\A-Za-z])\\$|~", " "),
    (r"\*\*", "^"),
    (r"\+/-", r"\\pm "),
    (r"\\[$%]|%", " "),
    (r"(\\frac|\\sqrt)(?![A-Za-z{\[]) ?(\w|\\[A-Za-z]+)", r"\1{\2}"),  # \frac12 is \frac{1}2,
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w)", r"\1{\2}"),  # and that is \frac{1}{2}
    (r"(\^\{\w+\}) ?(?=\d)", r"\1\\cdot "),  # 2^{3}5
    (r"([\^_])\{(\w)\}", r"\1\2"),
    (r"\^ ?(-\w+)", r"^{\1}"),
    (r"(?<![\d}])\.(?=\d)", "0."),
    (r"(?:^|(?<=[(\[,=;]))\s*\+(?=\s*[\d\\.A-Za-z(])", ""),  # +\infty
    (r"(?<![A-Za-z])([ap])\. ?m\.?(?![A-Za-z])", r"\1m"),
    (r"(?<=\d) ?x ?(?=10\^)", r"\\cdot "),
    (r"(?<![\w.])(\d+\.\d+|1|\d+(?=E|e\d|e[-+]\d\d))[eE]([-+]?\d+)(?![\d.])", r"\1\\cdot 10^{\2}"),
    (r"^(?:approximately|about|roughly|around|\\approx) ", ""),
]
RULES = [(re.compile(pattern), new) for pattern, new in SPELLINGS]
DEGREES = re.compile(r" ?(?:\^ ?\{? ?\\(?:circ|degree)(?![A-Za-z]) ?\}?|°|\\degree(?![A-Za-z]))")
DEGREES_OF = re.compile(rf"(\d+(?:\.\d+)?){DEGREES.pattern}")
TRIGONOMETRIC = re.compile(rf"\\(?:{TRIGONOMETRY})|(?:{TRIGONOMETRY}) ?\(?\d")
WORDS = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|textup|mathrm|mathbf|mathit|mathsf|boldsymbol|bf|rm)"
    r"\s?\{([^{}]*)\}"
)
CONSTANT = re.compile(r"\\(?:mathrm|text|rm)\s?\{ ?([ie]) ?\}")  # 2\mathrm{i} is no unit
LETTER = r"[^\W\d_]"
PLAIN = re.compile(rf"""["']?{LETTER}(?:{LETTER}|[ .'-])*["']?""")  # words alone
CHOICE = re.compile(r"\(?[A-Za-z]\)")  # of a multiple-choice question
AND = re.compile(r",?\s?(?:\\text\{ ?,? ?(?:and|or) ?\}|(?<=\s)(?:and|or)(?=\s))\s?")
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
THOUSANDS = re.compile(r"(?<![\d.,(\[])(?<![(\[]-)(?<!\\\{)[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| \d)")
LIST_OF_LARGE = re.compile(r"\d,\s+\d{3}(?!\d)")  # "45, 135" is not 45,135
MIXED = re.compile(r"(?<![\d.^/] )(?<![\d.^/])(\d+) (\d+)/(\d+)(?![\d/.])")


# ------------------------------------------------------------------------------------------- units

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"(?<=\d) ?({'|'.join(SCALES)})\b")
UNITS = [  # names of one unit, which is another one than those of the other lines
    "h hr hrs hour hours",
    "min mins minute minutes",
    "s sec secs second seconds",
    "day days",
    "week weeks",
    "month months",
    "yr yrs year years",
    "mm millimeter millimeters",
    "cm centimeter centimeters",
    "m meter meters metre metres",
    "km kilometer kilometers",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "mg",
    "g gram grams",
    "kg kilogram kilograms",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "ml milliliter milliliters",
    "L liter liters litre litres",
    "pair pairs",
    "dozen",
    "deg degree degrees",
    "rad radian radians",
    "dollar dollars USD",
    "cent cents",
]
MEASURES = {name: line.split()[0] for line in UNITS for name in line.split()}
# other units of under four letters, and those that physicists write in formulas
SHORT = re.compile(
    "(?:pct|mph|kph|rpm|gal|sq|cu|EUR|m[ae]n|boy|box|cup|car|pen|egg|pie|cat|dog|bag)s?"
)
SYMBOL = r"(?:[kcm]?[mgsNJWVAKLC]|k?Hz|Pa|mol|eV|h|ft|mi|yr)(?: ?\^ ?\{?-?\d\}?)?"
COMPOUND = re.compile(
    rf"(?<=[\d}}]) (?:{SYMBOL} ?[/*] ?)+{SYMBOL}$|(?<=[\d}}]) [kcm]?m ?\^ ?\{{?[23]\}}?$"
)
LONG = "|".join(name for name in MEASURES if len(name) > 3)
ATTACHED = re.compile(rf"(?<=\d)(?:cm|mm|km|kg|lbs?|mph|kph|{LONG})(?:\^[23])?$")  # 10cm
# Words behind a number that are no unit, because they change its value. Functions may have an
# argument of a letter: sinx; but logs and seconds are units.
CHANGING = re.compile(
    r"(?!(?:cost|logs|secs|sins|tans|cots)$)"
    rf"(?:(?:{FUNCTION})(?:alpha|beta|theta|phi|pi|[a-z])?)+"
    r"|alpha|beta|gamma|delta|epsilon|lambda|omega|theta|sigma|phi|rho|tau|pi"
    r"|\w*illions?|hundreds?|thousands?|lakhs?|crores?|dozenth|hal(?:f|ves)|quarters?"
    r"|\w*(?:ir|four|fif|six|seven|eigh|nin|ten|elf|el|twentie|hundred|thousand|million)(?:th|d)s?"
    r"|plus|minus|times|over|divided|raised|remainder|factorial|squared|cubed|doubled|tripled"
    r"|choose|modulo|mod|base|more|less|fewer|below|above|increase|decrease|profit|loss"
    r"|north|south|east|west|left|right|up|down|odd|even|infinitely|or|and|out|to|am|pm|o'clock"
)
VARIABLES = ("x", "y", "z", "n", "k")  # \text{x} is no unit
UNIT = re.compile(r"(?:(?<=[\d)}\]])|(?<=\\pi)) ([A-Za-z][A-Za-z&.' -]*)((?:\^\{?\d\}?)?)$")
NOTE = re.compile(  # 9 (apples), 12 (cm^2), 50 (%)
    r"(?<=\d) \((?!if |when |where |for )(?:[A-Za-z][A-Za-z /]+(?:\^\{?[23]\}?)?|\s*)\)$"
)
PER = re.compile(
    r"(?: ?/ ?| per | an? )(?:hour|hr|h|day|week|month|year|minute|min|second|sec|s|person)s?$"
)
TEXT_UNIT = re.compile(  # \text{ m}/\text{s}^2
    r"(?:\s*[/*]?\s*\\(?:text|mbox|mathrm|textrm)\s?\{[^{}]*\}(?: ?\^ ?\{?-?\d\}?)?)+$"
)


def measure(text: str) -> tuple[str, str, str]:
    """The unit behind the last digit of an answer, its power, and what it is per; "" if unknown.

    "60 cm^2/min" has cm, 2 and min.
    """
    behind = re.match(r".*(?<!\^)(?<!\^\{)\d(.*)", text, re.DOTALL)
    if not behind:
        return "", "", ""
    tail = behind[1]
    unit, _, per = re.sub(r"/| per | an? ", "/", tail).partition("/")
    words, per_words = (re.findall("[A-Za-z]+", part) for part in (unit, per))
    found = next((MEASURES[word] for word in words if word in MEASURES), "")
    if DEGREES.search(tail):
        found = "deg"
    elif not found and text.count("$") == 1:
        found = "dollar"
    power = re.search(r"\^\{?([23])", unit)
    named = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    power = power[1] if power else next((named[word] for word in words if word in named), "")
    return found, power, next((MEASURES[word] for word in per_words if word in MEASURES), "")


def without_unit(text: str) -> str:
    """The text without the unit behind its number, and with a scale as a power of ten."""
    scale = SCALE.search(text)
    if scale:
        text = text.replace(scale[0], f"\\cdot 10^{{{SCALES[scale[1]]}}}", 1)
    worded = TEXT_UNIT.search(text)
    if worded:
        before = text[: worded.start()].rstrip()
        words = WORDS.sub(r" \1 ", worded[0])
        measured = (
            before[-1:].isdigit() or before[-1:] in (")", "}", "]") or before.endswith("\\pi")
        )
        return before if measured and not changes(words) else text
    note = NOTE.search(text)
    text = text[: note.start()] if note and not changes(note[0]) else text
    for pattern in (COMPOUND, PER, ATTACHED):
        text = pattern.sub("", text)
    unit = UNIT.search(text)
    if not unit or changes(unit[1]):
        return text
    words = unit[1].replace(".", " ").split()
    after_pi = text[: unit.start()].endswith("\\pi")
    variables = any(len(word) == 1 and word != "a" for word in words)  # 3 feet x
    return text if variables or not is_unit(words[0], after_pi) else text[: unit.start()]


def is_unit(word: str, after_pi: bool) -> bool:
    """Whether a word behind a space and a number is a unit; 2\\pi hr may be a product."""
    if len(word) > 3:
        return True
    if after_pi:
        return word in ("rad", "cm", "mm", "sq")
    return bool(SHORT.fullmatch(word)) or word in MEASURES and len(word) > 1


def changes(words: str) -> bool:
    """Whether words behind a number change its value, or are a variable."""
    found = re.findall(r"[A-Za-z']+", words.lower())
    return any(CHANGING.fullmatch(word) for word in found) or words.strip() in (
        "x",
        "y",
        "z",
        "n",
        "k",
    )


# ----------------------------------------------------------------------------------------- writing


def normalise(answer: str) -> str:
    """The answer without what does not change its meaning.

    Sizes, spaces, currencies, percent and degree signs, and units are removed. Words alone are in
    lower case.
    """
    text = answer.strip()
    if len(text) > LONGEST:
        return text
    # doubled backslashes, but those between the rows of a matrix
    text = text.replace("\\\\", NEXT_ROW if "\\begin" in text else "\\")
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda run: f"^{{{run[0].translate(RAISED)}}}", text)
    text = re.sub(r"[₀-₉]+", lambda run: f"_{{{run[0].translate(LOWERED)}}}", text)
    text = "".join(SYMBOLS.get(character, character) for character in text)
    text = " ".join(text.split()).strip('*" ')
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        text = text.removeprefix(left).removesuffix(right)
    text = CONSTANT.sub(r" \1 ", text)
    if TRIGONOMETRIC.search(text):
        text = DEGREES_OF.sub(r"{\\frac{\1\\pi}{180}}", text)
    text = re.sub(rf"{DEGREES.pattern}(?: ?[CF](?![A-Za-z]))?", " ", text)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    whole = WORDS.fullmatch(text.strip())
    text = (whole[1] if whole else text).strip().rstrip(".,;").strip()
    if CHOICE.fullmatch(text):
        text = text.strip("()")
    if PLAIN.fullmatch(text):
        words = " ".join(text.split()).strip("\"'")
        variable = len(words) == 1 and words.lower() not in "abcdefgh"  # those may be choices
        return words if variable else words.lower()
    if not RELATION.search(text):
        text = AND.sub(", ", text)
    text = WORDS.sub(r" \1 ", without_unit(" ".join(text.split())))
    return without_spaces(" ".join(text.split())).rstrip(".")


def without_spaces(text: str) -> str:
    """The text without spaces; those between digits become what they stand for."""
    if LIST_OF_LARGE.search(text):
        text = re.sub(r",\s+", ";", text)
    text = SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(\^(?:\w|\{[^{}]*\})) (?=\d)|(?<=\d) (?=\d+\^)", r"\1\\cdot ", text)
    return re.sub(" ", lambda space: " " * needed(space), text)


def needed(space: re.Match) -> bool:
    """Whether a space separates: two numbers, a command and a letter, or "or" and a condition."""
    before, after = space.string[: space.start()], space.string[space.end() :]
    return bool(
        re.search(r"[\d.]$", before)
        and re.match(r"[\d.]", after)
        or re.search(r"\\[A-Za-z]+$", before)
        and re.match("[A-Za-z]", after)
        or re.search(r"(?<![A-Za-z])(?:or|and)$", before)
        or re.match(r"(?:or|and)\b", after)
    )
