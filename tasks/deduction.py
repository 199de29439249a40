"""The second built-in task: chains of deduction, in the manner of ProntoQA (arXiv 2210.01240).

A question has eight rules in any order, a fact and a query: `b>c a>~d ... a: ~d?`, "whatever is b is c; a is not d; given a, is it
not d?". A solution applies one rule a line (`a>b -> b`), until the query is decided: `#### yes` or `#### no`. The teacher who wrote the worked
solutions takes any rule in which the present concept occurs, also backwards (from `e>b` and b to e), and guesses when no rule or no line is
left: half of such guesses are right, so outcomes are noisy labels of steps. The goal stands in two rules, with either sign; which one can be
reached decides. Whether a step follows is seen in its text.
"""
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from svpo import InputError
from tasks.arithmetic import split_of
from tasks.questions import Question

CONCEPTS = "abcdefghijkl"
LENGTH = 3  # rules from the fact to the query


def draw(rng: random.Random) -> tuple[list[str], str, str, bool]:
    """Rules in the order of the question, the concept that is given, the one that is asked for, and whether it holds."""
    fact, one, two, goal, other, false, *ends = rng.sample(CONCEPTS, 8)
    holds = rng.random() < 0.5
    rules = [f"{fact}>{one}", f"{one}>{two}", f"{two}>{'' if holds else '~'}{goal}"]
    rules += [f"{fact}>{ends[0]}", f"{one}>{ends[1]}"]  # other ways to go, which end
    rules += [f"{other}>{one}", f"{other}>{false}", f"{false}>{'~' if holds else ''}{goal}"]  # read backwards, the first leads to a wrong answer
    rng.shuffle(rules)
    return rules, fact, goal, holds


def follows(rule: str, concept: str) -> str | None:
    """What the rule says of a concept: its conclusion, or None where the rule does not begin with it."""
    left, _, right = rule.partition(">")
    return right if left == concept else None


def careless(rules: list[str], concept: str, goal: str, rng: random.Random) -> str:
    """A worked solution of the teacher."""
    lines, left = [], list(rules)
    while True:
        usable = [(rule, right) for rule in left for first, _, right in [rule.partition(">")] if first == concept]
        usable += [(rule, first) for rule in left for first, _, right in [rule.partition(">")] if right == concept]
        if not usable or len(lines) == LENGTH + 1:
            lines[-1] += f" #### {rng.choice(('yes', 'no'))}"
            return "\n".join(lines)
        rule, concept = rng.choice(usable)
        left.remove(rule)
        lines.append(f"{rule} -> {concept}")
        if concept.strip("~") == goal:
            lines[-1] += f" #### {'no' if '~' in concept else 'yes'}"
            return "\n".join(lines)


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
    """Of each line of a solution: whether it applies a rule of the question, forwards, to what the lines before it (all sound) have shown."""
    *rules, fact, _ = text.replace(":", "").split(" ")
    concept, judged = fact, []
    for line in solution.strip().split("\n"):
        rule, _, rest = line.partition(" -> ")
        found = rest.partition(" #### ")[0].strip()
        judged.append(all(judged) and rule in rules and found != "" and follows(rule, concept) == found)
        concept = found
    return judged


def deduction_tokenizer() -> Tokenizer:
    """Concepts, marks and answers are single tokens."""
    words = ["<eos>", "\n", " ", ">", "~", ":", "?", " -> ", " #### ", "yes", "no", *CONCEPTS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" -> | #### |yes|no|[a-l>~:? \n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer
