"""The built-in task "deduction": chains of deduction, after ProntoQA (arXiv 2210.01240).

A question has five rules in any order, a fact and a query. `b>c a>~d ... a: d?` says: whatever is
b is c; a is not d; given a, is it d? A solution applies one rule a line (`a>b`, then `b>c`), until
one speaks of the query: `#### yes` or `#### no`. Two rules speak of the goal, with opposite signs.
One can be reached from the fact, the other cannot.

The teacher who wrote the worked solutions takes the rule that begins with the present concept, or
leaps. A leap takes one of the two rules about the goal, though nothing has shown what that rule
begins with. Half of the leaps hit the right answer, so outcomes are noisy labels of steps. Whether
a step follows shows in its text.
"""

import random
from collections.abc import Callable
from itertools import product

CONCEPTS = "abcdef"
SIGNS = ("", "~")  # is, is not

# How often the teacher leaps. Each of the two rules about the goal is more likely than the rule
# that goes on, so that the likeliest step of the teacher is a leap.
LEAPS = 0.7

RULES = [
    f"{left}>{sign}{right}"
    for left, sign, right in product(CONCEPTS, SIGNS, CONCEPTS)
    if left != right
]

# The tokens. A rule is one token, because a model of this size learns to look up a token that
# begins with a concept, but not one that stands after another one.
WORDS = ["\n", " ", ":", "?", " #### ", "yes", "no", *CONCEPTS, *RULES]


def draw(rng: random.Random) -> tuple[str, str, Callable[[], str]]:
    """A question, its answer, and a function that writes a careless solution.

    The function draws from the same `rng`.
    """
    fact, one, two, goal, other, false = rng.sample(CONCEPTS, 6)
    holds = rng.random() < 0.5
    rules = [f"{fact}>{one}", f"{one}>{two}", f"{two}>{'' if holds else '~'}{goal}"]
    rules += [f"{other}>{false}", f"{false}>{'~' if holds else ''}{goal}"]  # never reached
    rng.shuffle(rules)
    question = f"{' '.join(rules)} {fact}: {goal}?"
    return question, "yes" if holds else "no", lambda: careless(rules, fact, goal, rng)


def careless(rules: list[str], concept: str, goal: str, rng: random.Random) -> str:
    """A worked solution of the teacher, who goes on from `concept` or leaps to the goal."""
    lines = []
    while concept.strip("~") != goal:
        if rng.random() < LEAPS:
            fitting = [rule for rule in rules if rule.endswith(goal)]
        else:
            fitting = [rule for rule in rules if rule.startswith(concept)]
        rule = rng.choice(fitting)
        concept = rule.partition(">")[2]
        lines.append(rule)
    return "\n".join(lines) + f" #### {'no' if '~' in concept else 'yes'}"


def sound(text: str, solution: str) -> list[bool]:
    """Judge each line of a solution to the question `text`.

    A line is sound if three things hold: all lines before it are sound; it applies a rule of the
    question to the fact, or to what the line before it has shown; and an answer that it states is
    what it shows of the query.
    """
    *rules, fact, query = text.replace(":", "").replace("?", "").split(" ")
    concept = fact
    judged = []
    for line in solution.strip().split("\n"):
        rule, stated, answer = (part.strip() for part in line.partition(" #### "))
        shown = rule.partition(">")[2]
        right = shown.strip("~") == query and answer == ("no" if "~" in shown else "yes")
        fits = right or not stated
        judged.append(all(judged) and rule in rules and rule.startswith(concept) and fits)
        concept = shown
    return judged
