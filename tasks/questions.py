"""Questions: from the built-in tasks, published benchmarks and JSONL files, and the splits to train and test on."""
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from svpo import InputError
from tasks import arithmetic, deduction
from tasks.grading import algebra, extract_answer, is_correct, needs_algebra
from tasks.published import find_file, to_row


@dataclass
class Question:
    id: str
    text: str
    answer: str
    solution: str | None = None  # worked solution, one step a line, for SFT


@dataclass(frozen=True)
class Task:
    """A built-in task: what draws a question, and its words, each one token beside end-of-text."""
    draw: Callable  # (random.Random) -> (question, answer, function that writes a worked solution)
    words: list[str]


TASKS = {"arithmetic": Task(arithmetic.draw, arithmetic.WORDS), "deduction": Task(deduction.draw, deduction.WORDS)}  # yours may be added
SPLITS = {"sft": range(0, 96), "search": range(96, 208), "valid": range(208, 224), "test": range(224, 256)}  # values of a byte


def is_built_in(spec: str) -> bool:
    """Whether a --data names a built-in task, not a file."""
    return spec.split(":")[0] in TASKS


def split_of(text: str) -> str:
    """The split that owns a question: by a hash of its text, so the splits are disjoint for every seed and size."""
    return next(name for name, owned in SPLITS.items() if hashlib.sha256(text.encode()).digest()[0] in owned)


def generate(name: str, split: str, count: int, seed: int) -> list[Question]:
    """`count` different questions of a split of a built-in task, drawn with `seed`; worked solutions in split sft only."""
    if split not in SPLITS:
        raise InputError(f"{name}:{split}: the splits of the built-in task are {', '.join(SPLITS)}")
    covered = one_of(TASKS[name].words)
    rng, seen, questions, vain = random.Random(f"{split} {seed}"), set(), [], 0
    while len(questions) < count:
        text, answer, work = TASKS[name].draw(rng)
        if not all(isinstance(part, str) for part in (text, answer)):
            raise InputError(f"task {name}: draw must return a question and an answer of type str, not {type(text).__name__} and {type(answer).__name__}")
        vain += 1
        if vain > 200_000:
            raise InputError(f"{count} questions of split {split!r} are wanted, but the built-in task {name} has only {len(questions)}")
        if text not in seen and split_of(text) == split:
            solution, vain = work(), 0
            if left := re.sub(covered, "", f"{text}\n{solution} #### {answer}"):
                raise InputError(f"task {name}: none of its words covers {left[0]!r}, as in {text!r}")
            seen.add(text)
            questions.append(Question(f"{split}-{seed}-{len(questions)}", text, answer, solution if split == "sft" else None))
    return questions


def one_of(words: list[str]) -> str:
    """A pattern of any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Each word is one token; <eos> is token 0, and what no word covers becomes it."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(one_of(words)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def task_tokenizer(name: str) -> Tokenizer:
    return word_tokenizer(TASKS[name].words)


def to_question(row: dict, where: str, name: str) -> Question | None:
    """A row of a file as a question, `name` if it has no id; None where it has no answer, InputError where it is none."""
    row = to_row(row)
    if row is None:
        return None
    for key in ("question", "answer"):
        if not isinstance(row.get(key), (str, int, float)) or isinstance(row[key], bool) or not str(row[key]).strip():
            raise InputError(f"{where}: needs a non-empty {key!r} (text or number)")
    answer, solution = str(row["answer"]), row.get("solution")
    if "####" in answer:
        solution = solution or re.sub(r"<<[^<>]*>>", "", answer)  # without GSM8K's calculator marks
        answer = extract_answer(answer) or ""
        if not answer:
            raise InputError(f"{where}: no answer after '####'")
    if solution is not None and not isinstance(solution, str):
        raise InputError(f"{where}: 'solution' must be text")
    question = Question(str(row.get("id", name)), str(row["question"]).strip(), answer, solution)
    if any("\ud800" <= letter <= "\udfff" for text in (question.id, question.text, answer, solution or "") for letter in text):
        raise InputError(f"{where}: half of a surrogate pair is no text")
    return question


def load_questions(data: str, limit: int | None = None, seed: int = 0, data_dir: str = "") -> list[Question]:
    """Questions of a built-in task, NAME[:split] (default split: test), or of benchmarks and JSONL files, the first `limit` of each.

    A row has `question`, `answer` and optionally `solution` and `id`, or the fields of a published benchmark; where the
    answer ends with GSM8K's `#### N`, the text before it is the solution. Raises InputError with file and line.
    """
    if is_built_in(data):
        name, _, split = data.partition(":")
        return generate(name, split or "test", 500 if limit is None else limit, seed)
    questions, ids = [], set()
    for spec in [data] if Path(data).exists() else data.split():
        path = find_file(spec, data_dir)
        stem = path.stem if path == Path(spec) else f"{path.parent.name}-{path.stem}"
        for number, row in read_rows(path, limit):
            where = f"{path}, line {number}"
            question = to_question(row, where, f"{stem}-{number}")
            if question is None:
                print(f"{where}: no answer; left out")
                continue
            if question.id in ids:
                raise InputError(f"{where}: id {question.id!r} occurs twice")
            ids.add(question.id)
            questions.append(question)
    if not questions:
        raise InputError(f"{data}: no questions in this file")
    hard = [question.answer for question in questions if needs_algebra(question.answer)]
    if hard and not algebra.available():
        raise InputError(f"{data}: {len(hard)} answers, such as {hard[0]!r}, take algebra to compare: pip install math-verify")
    return questions


def load_splits(run) -> dict[str, list]:
    """Disjoint questions for a train.RunConfig: sft (worked solutions), search (a list a round), valid (sibling accuracy), test."""
    if is_built_in(run.data):
        searched = load_questions(f"{run.data}:search", run.rounds * run.search_questions, run.seed)
        return {"sft": load_questions(f"{run.data}:sft", run.sft_questions, run.seed),
                "search": [searched[number::run.rounds] for number in range(run.rounds)],
                "valid": load_questions(f"{run.data}:valid", run.valid_questions), "test": load_questions(f"{run.data}:test", run.test_limit)}
    questions = load_questions(run.data, run.limit or None, data_dir=run.data_dir)
    if run.test_data:
        test = load_questions(run.test_data, run.test_limit, data_dir=run.data_dir)
    else:
        held_out = max(1, len(questions) // 5)
        questions, test = questions[:-held_out], questions[-held_out:][:run.test_limit]
        print(f"no --test-data: the last {held_out} questions of {run.data} are held out for the table")
    tested = {question.text for question in test}
    kept = [question for question in questions if question.text not in tested]
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept)} training questions also stand in the test set and are dropped")
    if not kept:
        raise InputError(f"{run.data}: no question is left for training")
    return {"sft": [question for question in kept if question.solution], "search": [kept] * run.rounds, "valid": [], "test": test}


def read_rows(path: Path, limit: int | None = None, content: bytes | None = None):
    """(line number, object) of each non-blank line of a JSONL file, or of its `content`; the first `limit` of them."""
    try:
        lines = (path.read_bytes() if content is None else content).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    for number, line in [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is wanted, not {type(row).__name__}")
        yield number, row


def grader(question: Question):
    """Outcome of a terminal node: +1 where its answer is right, else -1 (no answer, cut and too deep included)."""
    def grade(node) -> float:
        return 1.0 if node.ending == "answer" and is_correct(extract_answer(node.text), question.answer) else -1.0
    return grade
