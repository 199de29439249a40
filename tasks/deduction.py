"""The second built-in task: chains of deduction, in the manner of ProntoQA (arXiv 2210.01240).

A question has five rules in any order, a fact and a query: `b>c a>~d ... a: d?`, "whatever is b is c; a is not d; given a, is it d?".
A solution applies one rule a line (`a>b`, then `b>c`), until one speaks of the query: `#### yes` or `#### no`. The goal stands in two rules, with
either sign: one can be reached from the fact, the other cannot. The teacher who wrote the worked solutions takes the rule that begins with the
present concept, or leaps: to one of the two rules about the goal, though nothing has shown what it begins with. Half of the leaps hit the right
answer, so outcomes are noisy labels of steps. Whether a step follows is seen in its text.
"""
import random
from typing import Callable

CONCEPTS = "abcdef"
LEAPS = 0.7  # how often the teacher leaps: more often to each of two rules than he goes on, so that his likeliest step is a leap
RULES = [f"{left}>{sign}{right}" for left in CONCEPTS for sign in ("", "~") for right in CONCEPTS if left != right]
WORDS = ["\n", " ", ":", "?", " #### ", "yes", "no", *CONCEPTS, *RULES]  # a rule is one token: a model of this size learns to look up a token that
#                                                                  begins with a concept, but not one that stands after another one


def draw(rng: random.Random) -> tuple[str, str, Callable[[], str]]:
    """A question, its answer, and what writes a careless solution."""
    fact, one, two, goal, other, false = rng.sample(CONCEPTS, 6)
    holds = rng.random() < 0.5
    rules = [f"{fact}>{one}", f"{one}>{two}", f"{two}>{'' if holds else '~'}{goal}"]
    rules += [f"{other}>{false}", f"{false}>{'~' if holds else ''}{goal}"]  # never reached
    rng.shuffle(rules)
    return f"{' '.join(rules)} {fact}: {goal}?", "yes" if holds else "no", lambda: careless(rules, fact, goal, rng)


def careless(rules: list[str], concept: str, goal: str, rng: random.Random) -> str:
    """A worked solution of the teacher."""
    lines = []
    while concept.strip("~") != goal:
        leap = rng.random() < LEAPS
        rule = rng.choice([rule for rule in rules if (rule.endswith(goal) if leap else rule.startswith(concept))])
        concept = rule.partition(">")[2]
        lines.append(rule)
    return "\n".join(lines) + f" #### {'no' if '~' in concept else 'yes'}"


def sound(text: str, solution: str) -> list[bool]:
    """Of each line of a solution: whether it applies a rule of the question to what the lines before it, all of them sound, have shown; and whether
    an answer that it states is what it shows of the query."""
    *rules, fact, query = text.replace(":", "").replace("?", "").split(" ")
    concept, judged = fact, []
    for line in solution.strip().split("\n"):
        rule, stated, answer = (part.strip() for part in line.partition(" #### "))
        shown = rule.partition(">")[2]
        fits = not stated or shown.strip("~") == query and answer == ("no" if "~" in shown else "yes")
        judged.append(all(judged) and rule in rules and rule.startswith(concept) and fits)
        concept = shown
    return judged
