"""The second built-in task: chains of deduction, in the manner of ProntoQA (arXiv 2210.01240).

A question has seven rules in any order, a fact and a query: `b>c a>~d ... a: d?`, "whatever is b is c; a is not d; given a, is it d?".
A solution applies one rule a line (`a>b`, then `b>c`), until one speaks of the query: `#### yes` or `#### no`. The goal stands in two rules, with
either sign: one can be reached from the fact, the other cannot. The teacher who wrote the worked solutions takes any rule that begins with
the present concept; where there is none, a leap: one of the two rules about the goal, though nothing has shown what it begins with. Half of
the leaps hit the right answer, so outcomes are noisy labels of steps. Whether a step follows is seen in its text.
"""
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from svpo import InputError
from tasks.arithmetic import split_of
from tasks.questions import Question

CONCEPTS = "abcdefgh"


def draw(rng: random.Random) -> tuple[list[str], str, str, bool]:
    """Rules in the order of the question, the concept that is given, the one that is asked for, and whether it holds."""
    fact, one, two, goal, other, false, *ends = rng.sample(CONCEPTS, 8)
    holds = rng.random() < 0.5
    rules = [f"{fact}>{one}", f"{one}>{two}", f"{two}>{'' if holds else '~'}{goal}"]
    rules += [f"{fact}>{ends[0]}", f"{one}>{ends[1]}"]  # other ways to go, which end
    rules += [f"{other}>{false}", f"{false}>{'~' if holds else ''}{goal}"]  # never reached
    rng.shuffle(rules)
    return rules, fact, goal, holds


def careless(rules: list[str], concept: str, goal: str, rng: random.Random) -> str:
    """A worked solution of the teacher."""
    lines = []
    while concept.strip("~") != goal:
        usable = [rule for rule in rules if rule.startswith(concept)] or [rule for rule in rules if rule.endswith(goal)]
        rule = rng.choice(usable)
        concept = rule.partition(">")[2]
        lines.append(rule)
    return "\n".join(lines) + f" #### {'no' if '~' in concept else 'yes'}"


def deduction_questions(split: str, count: int, seed: int) -> list[Question]:
    """`count` different questions of a split, drawn with `seed`."""
    if split not in ("sft", "search", "valid", "test"):
        raise InputError(f"deduction:{split}: the splits of the built-in task are sft, search, valid, test")
    rng, seen, questions = random.Random(f"{split} {seed}"), set(), []
    while len(questions) < count:
        rules, fact, goal, holds = draw(rng)
        text = f"{' '.join(rules)} {fact}: {goal}?"
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        solution = careless(rules, fact, goal, rng) if split == "sft" else None
        questions.append(Question(f"{split}-{seed}-{len(questions)}", text, "yes" if holds else "no", solution))
    return questions


def sound(text: str, solution: str) -> list[bool]:
    """Of each line of a solution: whether it applies a rule of the question to what the lines before it, all of them sound, have shown."""
    *rules, fact, _ = text.replace(":", "").split(" ")
    concept, judged = fact, []
    for line in solution.strip().split("\n"):
        rule = line.partition(" #### ")[0].strip()
        judged.append(all(judged) and rule in rules and rule.startswith(concept))
        concept = rule.partition(">")[2]
    return judged


def deduction_tokenizer() -> Tokenizer:
    """A rule is one token: a model of this size learns to look up a token that begins with a concept, but not one after another token."""
    rules = [f"{left}>{sign}{right}" for left in CONCEPTS for sign in ("", "~") for right in CONCEPTS if left != right]
    words = ["<eos>", "\n", " ", ":", "?", " #### ", "yes", "no", *CONCEPTS, *rules]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-h]>~?[a-h]| #### |yes|no|[a-h:? \n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer
