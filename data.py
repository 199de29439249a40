"""Questions, tokens and trees: everything that the other modules read and write.

A `Question` comes from a built-in task, a published dataset or a file. A `StepFormat` says what
ends a step of its solution, and a `StepTokenizer` turns prompts and steps into tokens. A `Tree`
holds all solutions tried for one question; files of trees have one JSON line for each.

Dimension key: X tokens of a flat line (one for each lane that samples), V vocabulary.
"""

import copy
import dataclasses
import functools
import glob
import gzip
import json
import os
import random
import re
import sys
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support.chat import answer_end, chat_template
from support.files import (
    append,
    as_object,
    bytes_digest,
    digest,
    is_plain,
    json_object,
    parse_json,
    read_file,
    read_json,
    read_text,
    sealed,
    sync,
)
from support.flags import InputError, Recipe, flag
from support.hugging_face import find_folder, weights_mark
from support.tokenizer_files import UNLIMITED, read_tokenizer, vocabulary_of
from tasks.algebra import algebra
from tasks.built_in import generate, is_built_in
from tasks.code_steps import check_sandbox, split_xml
from tasks.grading import extract_answer, is_correct, needs_algebra


@dataclass
class Question:
    """A question with its right answer; the worked solution, if there is one, is for SFT.

    A solution is one text, or a list of its steps.
    """

    id: str
    text: str
    answer: str
    solution: str | list[str] | None = None


# --------------------------------------------------------------------------------- what ends a step


@dataclass(frozen=True)
class StepFormat:
    """How a solution is cut into steps.

    While a model writes, a step ends with the token that completes `delimiter` after some visible
    text, wherever in the token that falls. `split` cuts a worked solution into steps, each a list
    of (text, whether the model is to write it); by default it is cut at the delimiter.
    """

    delimiter: str
    split: Callable[[str], list[list[tuple[str, bool]]]] | None = None

    def steps(self, solution: str | list[str]) -> list[list[tuple[str, bool]]]:
        """The steps of a worked solution; the last one has no delimiter, end-of-text follows.

        Those of a list are steps as they are, whatever they hold.
        """
        if isinstance(solution, str) and self.split:
            return self.split(solution)
        if isinstance(solution, str):
            solution = [part for part in solution.split(self.delimiter) if part.strip()]
        parts = [part.strip("\n").removesuffix(self.delimiter) for part in solution]
        texts = [part + self.delimiter for part in parts]
        if parts and not self.split:
            texts[-1] = parts[-1]
        return [[(text, True)] for text in texts]

    def ended(self, text: str, before: str) -> bool:
        """Whether the newest token ends the step; `before` is the text without that token."""
        return text.lstrip().count(self.delimiter) > before.lstrip().count(self.delimiter)


LINES = StepFormat("\n")
PARAGRAPHS = StepFormat("\n\n")
XML = StepFormat("</step>", split_xml)
STEP_FORMATS = {"lines": LINES, "paragraphs": PARAGRAPHS, "xml": XML}  # the values of --steps
IN_CACHE = 2**18  # logits that a CPU samples from at once: 1 MB in float32
BEGINNING = b'{"id": "'  # of a line of trees
MOST_TOKENS = 2**20  # of a tree that is read from a file
MOST_PAIRS = 2 * 10**6  # of siblings in such a tree


# ------------------------------------------------------------------- rows of published datasets

# What the parts of a question are called, in the order in which they are looked for.
QUESTION_FIELDS = ("question", "problem", "input")
ANSWER_FIELDS = (
    "answer",
    "expected_answer",
    "final_answer",
    "target",
    "correct",
    "correct_answer",
    "answerkey",
)
PLACEHOLDERS = ("proof", "notfound")  # of NuminaMath, in place of an answer
CHOICE_FIELDS = ("options", "choices")
# of solutions to be judged; the last one may be the reference beside a model's response
SOLUTION_FIELDS = ("steps", "completions", "response", "completion", "output", "solution")
ID_FIELDS = ("id", "unique_id", "question_id", "problem_id")
LETTERED = re.compile(r"\(?([A-Za-z])\s*[).:]\s*(.*)", re.DOTALL)  # "A) 21"


def plain(row: dict) -> Question | None:
    """A row of your own file, or as datasets are published (docs/guide.md has a table).

    Names of fields may be in capitals. A "body" (SVAMP, ASDiv) stands before its question, choices
    (AQuA, MMLU) behind it. If no field has just the answer, it is what stands after GSM8K's mark
    ####, or what the solution states. None for a row without a question or an answer.
    """
    row = in_lower_case(row)
    question = with_body(row, *QUESTION_FIELDS)
    answer = text_field(row, *ANSWER_FIELDS)
    answer = "" if answer in PLACEHOLDERS else answer
    solution = row.get("solution")
    solution = "\n".join(map(str, solution)) if isinstance(solution, list) else solution
    if "####" in answer:  # GSM8K; its solutions hold <<1+1=2>>
        solution = solution or re.sub(r"<<[^<>]*>>", "", answer)
        answer = extract_answer(answer)
    elif not answer and isinstance(solution, str):  # MATH, Minerva, NuminaMath
        answer = extract_answer(solution)
    choices = next(filter(None, map(row.get, CHOICE_FIELDS)), None)
    if question and answer and choices:
        question, answer = with_choices(question, choices, answer, row)
    return Question(id_of(row), question, answer, solution) if question and answer else None


def in_lower_case(row: dict) -> dict:
    """A row with the names of its fields in lower case."""
    return {str(key).lower(): value for key, value in row.items()}


def id_of(row: dict) -> str:
    """The id of a row; "" if it has none."""
    return next((str(row[key]) for key in ID_FIELDS if row.get(key) is not None), "")


def with_body(row: dict, *keys: str) -> str:
    """The question in the first of the fields that is not empty, behind the row's "body"."""
    question = text_field(row, *keys)
    body = text_field(row, "body")
    if question and body:
        question = f"{body}{' ' if body[-1] in '.!?' else '. '}{question}"
    return question


def text_field(row: dict, *keys: str) -> str:
    """The first field that is not empty, as text; "" if there is none.

    The elements of a list are joined by commas. 7.0 is 7, and 0.30000000000000004 is 0.3.
    InputError if a field holds something else than text or numbers.
    """
    for key in keys:
        value = row.get(key)
        if key == "correct" and isinstance(value, bool):  # whether a choice is right
            continue
        texts = []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, (str, int, float, type(None))):
                raise InputError(f"{key!r} must be text or a number, not {type(one).__name__}")
            if isinstance(one, float):
                one = int(one) if one.is_integer() and abs(one) < 2**53 else f"{one:.15g}"
            texts += [] if one in (None, "nan") else [str(one).strip()]
        if any(texts):
            return ", ".join(texts)
    return ""


def with_choices(question: str, choices, answer: str, row: dict) -> tuple[str, str]:
    """A multiple-choice question with its choices, and the letter of the right one.

    Choices are a list, a text, {"A": "21", ...}, {"label": ["A", ...], "text": ["21", ...]} or
    [{"label": "A", "text": "21"}, ...]. The answer is a letter, a choice as it stands there, or a
    JSON number, which counts choices from 0 on.
    """
    if isinstance(choices, str):
        return f"{question}\n{choices.strip()}", answer
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):
        pairs = list(zip(choices.get("label", []), choices["text"]))
    elif isinstance(choices, dict):
        pairs = [(letter, text) for letter, text in choices.items() if text is not None]
    elif all(isinstance(one, dict) for one in choices):
        pairs = [(one.get("label"), one.get("text")) for one in choices]
    else:
        found = [LETTERED.fullmatch(str(text).strip()) for text in choices]
        alphabet = [chr(ord("A") + place) for place in range(len(choices))]
        pairs = list(zip(alphabet, choices))
        if all(found) and [one[1].upper() for one in found] == alphabet:
            pairs = [one.groups() for one in found]
    letters = [str(letter) for letter, _ in pairs]
    texts = [str(text).strip() for _, text in pairs]
    labelled = LETTERED.fullmatch(answer)
    number = any(type(row.get(key)) is int and str(row[key]) == answer for key in ANSWER_FIELDS)
    if answer not in letters:
        if number and int(answer) in range(len(letters)):
            answer = letters[int(answer)]
        elif answer in texts:
            answer = letters[texts.index(answer)]
        elif labelled and labelled[1] in letters:  # "B) 22.5"
            answer = labelled[1]
    lines = [f"({letter}) {text}" for letter, text in zip(letters, texts)]
    return "\n".join([question, *lines]), answer


def prontoqa(row: dict) -> Question | None:
    """{"question": "... True or false: ...?", "answer": [{"text": "... The answer is true."}]}

    The text is the solution. InputError if the answer is not such a list.
    """
    answers = row.get("answer")
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], dict):
        raise InputError("needs an 'answer' that is a list of objects")
    return plain({**row, "answer": None, "solution": answers[0].get("text")})


@dataclass(frozen=True)
class Dataset:
    """A published dataset: how its rows are read, and where its files are.

    `read(row)` returns a Question, whose id may be empty, or None for a row that has no answer. It
    raises InputError for a row that is not of this dataset. `address` holds {split}.
    """

    read: Callable[[dict], Question | None]
    splits: tuple[str, ...] = ()
    address: str | None = None
    steps: StepFormat = LINES


GITHUB = "https://raw.githubusercontent.com"
QWEN = GITHUB + "/QwenLM/Qwen2.5-Math/main/evaluation/data"
MATH_500 = "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"
GSM8K = GITHUB + "/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
DATASETS = {  # yours may be added
    "plain": Dataset(plain),
    "gsm8k": Dataset(plain, ("train", "test"), GSM8K),
    "math": Dataset(plain, ("train", "test"), QWEN + "/math/{split}.jsonl"),
    "math500": Dataset(plain, ("test",), MATH_500),
    "svamp": Dataset(plain, ("test",), QWEN + "/svamp/test.jsonl"),
    "mawps": Dataset(plain, ("singleop", "addsub", "multiarith"), QWEN + "/mawps/{split}.jsonl"),
    "prontoqa": Dataset(prontoqa, ("train", "test")),
}


# -------------------------------------------------------------------------------- reading questions


def locate(spec: str, data_dir: str, split: str = "") -> tuple[str, Path]:
    """The dataset and the file that a word of --data names.

    NAME or NAME:SPLIT is a file of that dataset, NAME:FILE reads a file as that dataset's. Without
    SPLIT it is `split` where the dataset has that one, else its first. Any other word is a file:
    of the dataset that its folder is named after (math/train.jsonl), else of `plain`.
    """
    name, _, rest = spec.partition(":")
    if name not in DATASETS:
        folder = Path(spec).absolute().parent.name
        return folder if folder in DATASETS else "plain", Path(spec)
    splits = DATASETS[name].splits
    if rest not in splits and Path(rest).is_file():
        return name, Path(rest)
    split = rest or (split if split in splits else next(iter(splits), ""))
    if split not in splits:
        known = f"the splits of {name} are {', '.join(splits)}" if splits else "name a file"
        raise InputError(f"--data {spec}: {known}; there is no file {rest!r} either")
    return name, download(name, split, data_dir)


def download(name: str, split: str, data_dir: str) -> Path:
    """The file of a split: NAME/SPLIT.jsonl in `data_dir`; without that, downloaded once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "svpo"
    local = (Path(data_dir) if data_dir else cache) / name / f"{split}.jsonl"
    if local.exists():
        return local
    template = DATASETS[name].address
    if data_dir or not template:
        hint = "" if template else "; there is no public address for it, use --data-dir"
        raise InputError(f"--data {name}:{split}: {local} does not exist{hint}")
    address = template.format(split=split)
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(f"{local.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            partial.write_bytes(answer.read())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--data {name}:{split}: {address} could not be read ({error}); put the file at {local}"
        )
    os.replace(partial, local)
    return local


CONVERT = (
    "import pandas; pandas.read_{kind}({name!r}).to_json({new!r}, orient='records', lines=True)"
)


def read_rows(
    file: Path, limit: int | None = None, content: bytes | None = None
) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line of a JSONL file that is not blank; the first `limit`.

    `content` takes the place of what the file holds. InputError names the line of a bad one.
    """
    try:
        text = (read_file(file) if content is None else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read ({error})")
    lines = [pair for pair in enumerate(text.split("\n"), 1) if pair[1].strip()]
    for number, line in lines[:limit]:
        yield number, json_object(line, f"{file}, line {number}")


def read_published(file: Path, limit: int | None) -> Iterator[tuple[int, dict]]:
    """(number, object) of each row of a question file: JSONL or a JSON array, plain or in gzip.

    InputError for parquet and CSV, with the command that converts them.
    """
    content = read_file(file)
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error})")
    kinds = {".csv": "csv", ".parquet": "parquet"}
    kind = "parquet" if content[:4] == b"PAR1" else kinds.get(file.suffix.lower())
    if kind:
        command = CONVERT.format(kind=kind, name=str(file), new=str(file.with_suffix(".jsonl")))
        raise InputError(f'{file}: a {kind} file; convert it: python -c "{command}"')
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    if content.lstrip()[:1] != b"[":
        yield from read_rows(file, limit, content)
        return
    for number, row in enumerate(parse_json(content, str(file))[:limit], 1):
        yield number, as_object(row, f"{file}, row {number}")


def to_question(row: dict, dataset: str, where: str, identity: str) -> Question | None:
    """A row of a dataset as a question, with `identity` as its id if it has none of its own.

    None for a row without a question or answer; InputError, which begins with `where`, for a bad
    row.
    """
    try:
        question = DATASETS[dataset].read(row)
    except InputError as error:
        kind = "" if dataset == "plain" else f", read as a row of {dataset}"
        raise InputError(f"{where}{kind}: {error}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise InputError(f"{where}: not a row of {dataset} ({kind}: {error})")
    if question is None:
        return None
    if question.solution is not None and not isinstance(question.solution, str):
        raise InputError(f"{where}: 'solution' must be text")
    question.id = question.id or identity
    check_letters(question.id + question.text + question.answer + (question.solution or ""), where)
    return question


def check_letters(text: str, where: str):
    """Refuse half of a pair of surrogates, which no tokenizer reads."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: the text contains an unpaired surrogate")


def new_id(identity: str, ids: dict[str, int]) -> str:
    """An id that is not in `ids`, and is added there: repeated ones get numbers."""
    found = identity
    while found in ids:
        ids[identity] += 1
        found = f"{identity}-{ids[identity]}"
    ids[found] = 1
    return found


def load_questions(
    spec: str, limit: int | None = None, seed: int = 0, data_dir: str = "", split: str = "train"
) -> list[Question]:
    """The questions that --data names, the first `limit` of each file.

    `spec` is a built-in task, NAME[:SPLIT] (by default split test; 500 questions, drawn with
    `seed`), or words as `locate` reads them; `split` is taken of datasets that are named without
    one. InputError names the file and line of a bad row.
    """
    if is_built_in(spec):
        name, _, split = spec.partition(":")
        count = 500 if limit is None else limit
        return [Question(*row) for row in generate(name, split or "test", count, seed)]
    questions = []
    ids = {}
    for word in split_words(spec):
        dataset, file = locate(word, data_dir, split)
        if word in DATASETS and word != "plain":
            print(f"--data {word}: {file}")
        stem = file.stem if file == Path(word) else f"{file.parent.name}-{file.stem}"
        empty = []  # rows without a question or an answer
        for number, row in read_published(file, limit):
            question = to_question(row, dataset, f"{file}, line {number}", f"{stem}-{number}")
            if question is None:
                empty.append(number)
                continue
            question.id = new_id(question.id, ids)
            questions.append(question)
        if empty:
            print(
                f"{file}: {len(empty)} rows left out, without a question or an answer; the first "
                f"is line {empty[0]}"
            )
    if not questions:
        raise InputError(
            f"{spec}: no questions; a row needs one of {', '.join(QUESTION_FIELDS)}, and one of "
            f"{', '.join(ANSWER_FIELDS)}"
        )
    hard = [question.answer for question in questions if needs_algebra(question.answer)]
    if hard and not algebra.available():
        raise InputError(
            f"{spec}: {len(hard)} answers, such as {hard[0]!r}, can only be compared by algebra: "
            "pip install math-verify"
        )
    return questions


def read_solutions(
    file: Path, steps: StepFormat, limit: int | None = None
) -> list[tuple[Question, int | None]]:
    """Questions with a solution each, and its label: the index of the first wrong step.

    The label is -1 if all steps are right, and None if the row has none. The `limit` first rows are
    read. InputError names the line of a bad row; rows without a question or a solution are left
    out, and counted aloud.
    """
    found = []
    empty = []
    for number, row in read_published(file, limit):
        where = f"{file}, line {number}"
        try:
            solved = to_solution(row, steps)
        except InputError as error:
            raise InputError(f"{where}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not a solution ({type(error).__name__}: {error})")
        if solved is None:
            empty.append(number)
            continue
        question, _ = solved
        question.id = question.id or f"{file.stem}-{number}"
        check_letters(question.id + question.text + "".join(question.solution), where)
        found.append(solved)
    if empty:
        print(
            f"{file}: {len(empty)} rows left out, without a question or a solution; the first is "
            f"line {empty[0]}"
        )
    if not found:
        fields = ", ".join(SOLUTION_FIELDS)
        raise InputError(f"{file}: no solutions; a row needs a question and one of {fields}")
    return found


def to_solution(row: dict, steps: StepFormat) -> tuple[Question, int | None] | None:
    """A row with a solution, whose text `steps` splits, and its label; None without a solution.

    {"id": "7", "question": "1+1?", "solution": "1+1=2\n#### 2"}, or with a list of steps, as in
    ProcessBench (arXiv 2412.06559), {"id": "gsm8k-0", "problem": "...", "steps": ["...", "..."],
    "label": 1}, or in TRL, {"prompt": "...", "completions": ["...", "..."], "labels": [true,
    false]}. A solution may also be the answer of GSM8K.
    """
    row = in_lower_case(row)
    question = with_body(row, *QUESTION_FIELDS, "prompt")
    choices = next(filter(None, map(row.get, CHOICE_FIELDS)), None)
    if question and choices:
        question, _ = with_choices(question, choices, "", row)
    solution = solution_of(row)
    count = len(steps.steps(solution)) if solution else 0
    if not question or not count:
        return None
    return Question(id_of(row), question, "", solution), label_of(row, count)


def solution_of(row: dict) -> str | list[str] | None:
    """The solution of a row, one text or a list of its steps; None if there is none."""
    for key in SOLUTION_FIELDS:
        value = row.get(key)
        texts = value if isinstance(value, list) else [value]
        if value is None or value == [] or isinstance(value, str) and not value.strip():
            continue
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(f"{key!r} must be text, or a list of texts of which none is blank")
        return value
    question = plain(row)
    return question.solution if question else None


def label_of(row: dict, count: int) -> int | None:
    """The index of the first wrong of `count` steps, or -1; None if the row has no label."""
    label, marks = row.get("label"), row.get("labels")
    if label is None and isinstance(marks, list) and marks:
        if not all(isinstance(mark, bool) for mark in marks):
            raise InputError("'labels' must have true or false for each step")
        if len(marks) != count:
            raise InputError(f"there are {len(marks)} labels, but the solution has {count} steps")
        return marks.index(False) if False in marks else -1
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is not None and type(label) is not int:
        raise InputError(f"'label' must be the index of a step, or -1, not {label!r:.40}")
    if label is not None and not -1 <= label < count:
        raise InputError(f"the label is {label}, but the solution has {count} steps")
    return label


def load_splits(run) -> dict[str, list]:
    """The questions of a run (train.RunConfig), by what they are for.

    `sft` have worked solutions, `search` is a list for each round, `valid` serves sibling accuracy,
    and `test` the table. Those of a built-in task are all disjoint. Of files, test questions are
    kept out of training, every round searches the same questions, and there is no `valid`.
    """
    if is_built_in(run.data):
        count = run.rounds * run.search_questions
        searched = load_questions(f"{run.data}:search", count, run.seed)
        return {
            "sft": load_questions(f"{run.data}:sft", run.sft_questions, run.seed),
            "search": [searched[number :: run.rounds] for number in range(run.rounds)],
            "valid": load_questions(f"{run.data}:valid", run.valid_questions),
            "test": load_questions(f"{run.data}:test", run.test_limit),
        }
    questions, test = [], []
    for word in split_words(run.data):
        found = load_questions(word, run.limit or None, data_dir=run.data_dir)
        held_out = 0 if run.test_data else max(1, len(found) // 5)
        questions += found[: len(found) - held_out]
        test += found[len(found) - held_out :]
    if run.test_data:
        test = load_questions(run.test_data, data_dir=run.data_dir, split="test")
    else:
        print(
            f"no --test-data: the last fifth of each file of {run.data}, {len(test)} questions, is "
            "held out for testing"
        )
    ids = {}  # of all files together
    for question in questions:
        question.id = new_id(question.id, ids)
    tested = {comparable(question.text) for question in test}
    kept = [question for question in questions if comparable(question.text) not in tested]
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept)} training questions are test questions; left out")
    if not kept:
        raise InputError(f"{run.data}: no question is left for training")
    if len(test) > run.test_limit:
        drawn = random.Random(run.seed).sample(range(len(test)), run.test_limit)
        test = [test[index] for index in sorted(drawn)]
    worked = [question for question in kept if question.solution]
    return {"sft": worked, "search": [kept] * run.rounds, "valid": [], "test": test}


def split_words(spec: str) -> list[str]:
    """The words of --data; a file whose name holds spaces is one word."""
    return [spec] if Path(spec).exists() else spec.split()


def question_files(source, split: str = "") -> list[Path]:
    """The files that --data names (SourceConfig); none for a built-in task."""
    if is_built_in(source.data):
        return []
    return [locate(word, source.data_dir, split)[1] for word in split_words(source.data)]


def identity_of(
    folder: Path | None, tokenizers: list["StepTokenizer"], reward: str = ""
) -> dict[str, str]:
    """Hashes of what a search or a run is made with: weights, tokenizer, prompts and reward.

    `folder` is the model's; None for one that is not there yet. `reward` is the value of --reward.
    """
    prompts = [one.chat(one.template) if one.chat else one.template for one in tokenizers]
    return {
        "weights": weights_mark(folder) if folder else "",
        "tokenizer": digest([tokenizers[0].tokenizer.to_str(), tokenizers[0].eos_ids]),
        "prompts": digest(prompts),
        "reward": load_reward(reward)[1],
    }


def check_trees(trees: list["Tree"], questions: list[Question], where: str):
    """Refuse trees that were grown for other questions under the ids of these."""
    asked = {question.id: question for question in questions}
    for tree in trees:
        question = asked.get(tree.id)
        if question and (tree.question, tree.answer) != (question.text, question.answer):
            raise InputError(f"{where}: tree {tree.id} is of another question or answer")


def comparable(text: str) -> str:
    """A question's text without what does not tell two questions apart.

    That is case, spaces (LaTeX's, too), dollar signs, braces and punctuation between words.
    """
    text = re.sub(r"\\[,;:! ]", "", text.lower())
    return re.sub(r"[\s${}.,;:!?'\"`\u2018\u2019\u201c\u201d]", "", text)


def outcome_of(question: Question, reward: str = "") -> Callable[[object], float]:
    """The outcome of a terminal node: +1 if its answer is right, else -1.

    A node that is cut, too deep or states no answer is wrong, too. With `reward` (the value of
    --reward) it is what that function returns for the whole solution. Such a function judges
    finished solutions only, with an answer or without; a node that is cut or too deep gets -1.
    """

    def outcome(node) -> float:
        answered = node.ending == "answer"
        right = answered and is_correct(extract_answer(node.text), question.answer)
        return 1.0 if right else -1.0

    def rewarded(node) -> float:
        if node.ending in ("cut", "deep"):
            return -1.0
        return reward_of(reward, question, "".join(step.text for step in node.path()))

    return rewarded if reward else outcome


def reward_of(reward: str, question: Question, text: str) -> float:
    """What the function of --reward returns for a solution.

    InputError with the file and the question if it fails, or returns anything but a number within
    [-1, 1].
    """
    function, _ = load_reward(reward)
    where = f"--reward {reward}, question {question.id}"
    try:
        value = function(dataclasses.replace(question), text)  # a copy, which it may change
    except BaseException as error:
        raise InputError(f"{where}: {described(error)}")
    if isinstance(value, bool) or not isinstance(value, Real) or not -1 <= value <= 1:
        shown = repr(value) if type(value) in (int, float, bool, str) else type(value).__name__
        raise InputError(f"{where}: it returned {shown:.80}, not a number within [-1, 1]")
    return float(value)


def described(error: BaseException) -> str:
    """What an error of code that is not ours says; requests to stop are raised again."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


@functools.cache
def load_reward(reward: str) -> tuple[Callable[[Question, str], float] | None, str]:
    """The function that --reward FILE.py:FUNCTION names, and a hash of its file; None and "" of "".

    A process reads the file once, so that the hash is that of the code that runs. InputError if
    there is no such file or function, or if the file fails.
    """
    if not reward:
        return None, ""
    file, _, name = reward.rpartition(":")
    if not file or not name:
        raise InputError(f"--reward {reward}: it must be FILE.py:FUNCTION")
    content = read_file(Path(file))
    module = ModuleType(f"--reward {file}")
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    try:
        exec(compile(content, file, "exec"), module.__dict__)
    except BaseException as error:
        raise InputError(f"--reward {file}: {described(error)}")
    function = module.__dict__.get(name)
    if not callable(function):
        raise InputError(f"--reward {reward}: {file} has no function {name!r}")
    return function, bytes_digest(content)


def check_reward(reward: str, trees: str = ""):
    """Refuse a --reward that cannot be used, and --trees that were searched with another one.

    mcts.py keeps a hash of its reward beside its trees; other trees are taken as they are.
    """
    mark = load_reward(reward)[1]
    kept = Path(f"{trees}.config")
    if trees and is_plain(kept):
        found = as_object(read_json(kept).get("identity", {}), f"{kept}, identity")
        if found.get("reward", "") != mark:
            raise InputError(f"--trees {trees}: they were searched with another --reward")


# ------------------------------------------------------------------------------------------- tokens


class StepTokenizer:
    """A tokenizer.json with a prompt template, end-of-text ids, and what ends a step.

    All of `eos_ids` end a text, and the first one ends worked solutions. `chat`, if given, renders
    the prompt in a chat template. With `tools` the code of XML steps runs where it ends
    (tasks/code_steps.py). The model has `vocabulary` token ids; higher ones are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: list[int],
        template: str = "{question}\n",
        chat: Callable[[str], str] | None = None,
        steps: StepFormat = LINES,
        tools: bool = False,
        vocabulary: int = UNLIMITED,
    ):
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.template = template
        self.chat = chat
        self.steps = steps
        self.tools = tools
        self.vocabulary = vocabulary
        # a longer delimiter may span tokens, so it must be looked for in the decoded text
        self.long_delimiter = len(steps.delimiter) > 1
        self.tables_4V = self.make_tables()

    @staticmethod
    def load(folder: str | Path, template: str = "{question}\n", **more) -> "StepTokenizer":
        """The tokenizer of a folder in Hugging Face's layout."""
        folder = Path(folder)
        after_answer = answer_end(folder) if more.get("chat") else ""
        found = read_tokenizer(folder, after_answer)
        return StepTokenizer(*found, template, vocabulary=vocabulary_of(folder), **more)

    def make_tables(self) -> Tensor:
        """Of each token, four booleans (4, V): whether it ends the text, may end a step, holds
        visible text, and holds visible text before its delimiter."""
        delimiter = self.steps.delimiter
        known = [token for token in self.tokenizer.get_vocab().values() if token < self.vocabulary]
        rows = []
        for token in known:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            visible = self.long_delimiter or bool(text.strip())
            before = self.long_delimiter or bool(text.partition(delimiter)[0].strip())
            rows.append([token in self.eos_ids, delimiter[-1] in text, visible, before])
        tables_4V = torch.zeros(4, 1 + max(known), dtype=torch.bool)
        tables_4V[:, known] = torch.tensor(rows).T
        return tables_4V

    def encode_prompt(self, question: Question, room: int | None = None) -> list[int]:
        """The tokens of a question's prompt; InputError if there are more than `room`.

        What the tokenizer appends to a text (end-of-text) is left out: the solution follows.
        """
        text = self.template.replace("{question}", question.text)
        if self.chat:
            ids = self.tokenizer.encode(self.chat(text.strip()), add_special_tokens=False).ids
        else:
            encoding = self.tokenizer.encode(text)
            ids = encoding.ids
            while ids and encoding.special_tokens_mask[len(ids) - 1]:
                ids = ids[:-1]
        self.check_ids(ids, f"question {question.id}: its prompt")
        if room is not None and len(ids) > room:
            raise InputError(
                f"question {question.id}: its prompt has {len(ids)} tokens, "
                f"but beside one step the model's context has room for {room}"
            )
        return ids

    def check_ids(self, ids: list[int], what: str):
        """Refuse tokens that the model does not have."""
        for token in ids:
            if token >= self.vocabulary:
                word = self.tokenizer.id_to_token(token)
                raise InputError(
                    f"{what} has token {word!r} (id {token}), but the model has {self.vocabulary}"
                )

    def with_prompt(self, prompt_file: str) -> "StepTokenizer":
        """A copy with the template of another prompt file; itself if no file is named."""
        if not prompt_file:
            return self
        other = copy.copy(self)
        other.template = read_template(prompt_file)
        return other

    def set_prompt(self, tree: "Tree", question: Question) -> "Tree":
        """A tree that was grown under another prompt, with the prompt of this tokenizer."""
        prompt = self.encode_prompt(question)
        unwritten = [False] * len(prompt)
        root = dataclasses.replace(tree.nodes[0], tokens=prompt, sampled=unwritten)
        return dataclasses.replace(tree, nodes=[root, *tree.nodes[1:]])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that continues another one.

        Some tokenizers put a space before the first word of a text. An anchor in front prevents
        that, and its tokens are taken away again.
        """

        def ids(part: str) -> list[int]:
            return self.tokenizer.encode(part, add_special_tokens=False).ids

        anchor = "a" if text[0].isspace() else "\n"
        before = ids(anchor)
        both = ids(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else ids(text)

    def encode_steps(self, solution: str | list[str]) -> list[tuple[list[int], list[bool]]]:
        """Of each step of a worked solution its tokens, and which of them the model is to write.

        End-of-text, the first of `eos_ids`, ends the last step.
        """
        found = []
        for step in self.steps.steps(solution):
            tokens = []
            written = []
            for text, by_model in step:
                ids = self.encode(text)
                self.check_ids(ids, f"a worked solution, {text[:40]!r},")
                tokens += ids
                written += [by_model] * len(ids)
            found.append((tokens, written))
        if found:
            end = self.eos_ids[:1]
            found[-1] = (found[-1][0] + end, found[-1][1] + [True] * len(end))
        return found

    def encode_step(self, text: str, last: bool) -> list[int]:
        """The tokens of one step, ended by its delimiter or, if it is the `last`, end-of-text."""
        text = text.strip("\n")
        if not last and not text.endswith(self.steps.delimiter):
            text += self.steps.delimiter
        ids = self.encode(text)
        self.check_ids(ids, f"a step, {text[:40]!r},")
        return ids + (self.eos_ids[:1] if last else [])

    def draw(
        self, logits_XV: Tensor, uniform_X: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Sample tokens (X,), and return them with their untempered log-probabilities (X,).

        The cumulative distribution is inverted at `uniform_X` in [0, 1); at temperature 0 the
        likeliest token is taken. Ids that the tokenizer does not have are never sampled, but stay
        in the normaliser of the log-probabilities. On a CPU a few rows are worked on at a time, so
        that what is computed of them stays in the cache.
        """
        rows = max(1, IN_CACHE // logits_XV.shape[1])
        if logits_XV.is_cpu and len(logits_XV) > rows:
            parts = zip(logits_XV.split(rows), uniform_X.split(rows))
            drawn = [self.draw(*part, temperature) for part in parts]
            return tuple(torch.cat(found) for found in zip(*drawn))
        logits_XV = logits_XV.float()
        known_XV = logits_XV[:, : self.tables_4V.shape[1]]
        if temperature == 0:
            token_X = known_XV.argmax(dim=-1)
        else:
            cumulative_XV = (known_XV / temperature).softmax(dim=-1).cumsum(dim=-1)
            target_X1 = (uniform_X * cumulative_XV[:, -1])[:, None]
            token_X = torch.searchsorted(cumulative_XV, target_X1, right=True)[:, 0]
            token_X = token_X.clamp(max=known_XV.shape[1] - 1)
        logp_X = logits_XV.gather(1, token_X[:, None])[:, 0] - logits_XV.logsumexp(dim=-1)
        return token_X, logp_X


def read_template(file: str) -> str:
    """The prompt around {question}: the text of a file, or the question and a line break."""
    if not file:
        return "{question}\n"
    template = read_text(Path(file))
    if "{question}" not in template:
        raise InputError(f"{file}: the prompt must contain {{question}}")
    return template


# -------------------------------------------------------------------------------------------- trees


@dataclass
class TreeNode:
    """One step of a tree as it is stored; node 0 is the question's prompt."""

    parent: int  # index into Tree.nodes, always smaller than the node's own; -1 for the root
    tokens: list[int]
    # which tokens the model wrote, or is to write (worked solutions); the others carry no loss
    sampled: list[bool]
    # sum of the untempered log-probabilities of these tokens, in nats, under the policy that grew
    # the tree and its prompt; svpo.add_reference sets that of the reference
    logp: float = 0.0
    prior: float = 1.0  # exp(mean token log-probability)
    visit_count: int = 0
    q_value: float = 0.0
    value: float = 0.0  # V when the tree was grown
    # of terminal nodes, in [-1, 1]; without --reward +1 or -1. Above 0 is right, below 0 wrong
    reward: float | None = None
    ending: str | None = None  # terminal nodes: "answer", "eos", "cut" (too long) or "deep"


@dataclass
class Tree:
    """All solutions tried for one question; parents stand before their children."""

    id: str
    question: str
    answer: str
    nodes: list[TreeNode]
    simulations: int = 0  # effective number
    # why the search stopped: "simulations", "exhausted", "room" (it had used up its share of the
    # cache); "samples" if the tree is a group of samples
    stopped: str = "simulations"
    version: int = 1

    def path(self, index: int) -> list[int]:
        """The nodes from below the root down to `index`; empty for the root."""
        nodes = []
        while index > 0:
            nodes.append(index)
            index = self.nodes[index].parent
        return nodes[::-1]

    def tokens(self) -> int:
        """The number of tokens, the prompt included."""
        return sum(len(node.tokens) for node in self.nodes)


def solution_tree(question: Question, tokenizer: StepTokenizer) -> Tree:
    """A worked solution as a tree with one branch."""
    prompt = tokenizer.encode_prompt(question)
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    for tokens, written in tokenizer.encode_steps(question.solution):
        nodes.append(TreeNode(len(nodes) - 1, tokens, written))
    return Tree(question.id, question.text, question.answer, nodes)


def labelled_tree(
    question: Question, solutions: list[list[tuple[str, float]]], tokenizer: StepTokenizer
) -> Tree:
    """The tree of solutions whose steps somebody has labelled, for `train.py --trees`.

    A solution is a list of (text of a step, label). Labels go from -1, wrong, to 1, right; booleans
    are these two. Equal steps after the same steps are one node, with the mean of their labels as
    Q. A solution is right if its last label is above 0. End-of-text follows if that step states an
    answer. InputError for solutions or steps without text, and for other labels.
    """
    prompt = tokenizer.encode_prompt(question)
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    places = {}  # (parent, tokens) -> node
    for solution in solutions:
        path = [0]
        labels = []
        for number, (text, label) in enumerate(solution, 1):
            label = 2 * label - 1 if isinstance(label, bool) else label
            if not text.strip() or not is_number(label) or abs(label) > 1:
                raise InputError(f"question {question.id}: step {text!r:.60}, label {label!r}")
            answered = number == len(solution) and extract_answer(text) is not None
            tokens = tokenizer.encode_step(text, answered)
            parent = path[-1]
            place = places.setdefault((parent, tuple(tokens)), len(nodes))
            if place == len(nodes):
                nodes.append(TreeNode(parent, tokens, [True] * len(tokens)))
            path.append(place)
            labels.append(label)
        if not labels:
            raise InputError(f"question {question.id}: a solution without steps")
        reward = 1.0 if labels[-1] > 0 else -1.0
        nodes[path[-1]].reward = reward
        nodes[path[-1]].ending = "answer" if answered else None
        for index, label in zip(path, [reward, *labels]):
            node = nodes[index]
            node.visit_count += 1
            node.q_value += (label - node.q_value) / node.visit_count
    return Tree(question.id, question.text, question.answer, nodes, len(solutions), "samples")


def solution_fate(question: Question, tokenizer: StepTokenizer, search, context: int) -> str:
    """What a search would make of a worked solution if a model wrote it (mcts.SearchConfig).

    "right", "wrong" (another answer), "unparsed" (no answer stated), "cut" (a step is longer than
    --max-step-tokens), "deep" (more than --max-depth steps), or "long" (a prompt, solution and step
    to come that are longer than `context` tokens).
    """
    used = len(tokenizer.encode_prompt(question))
    steps = tokenizer.encode_steps(question.solution)
    for depth, (tokens, _) in enumerate(steps, 1):
        if used + search.max_step_tokens > context:
            return "long"
        if len(tokens) > search.max_step_tokens:
            return "cut"
        if depth > search.max_depth:
            return "deep"
        used += len(tokens)
        answer = extract_answer(tokenizer.tokenizer.decode(tokens))
        if answer is not None:
            return "right" if is_correct(answer, question.answer) else "wrong"
    return "unparsed"


def check_solutions(questions: list[Question], tokenizer: StepTokenizer, search, context: int):
    """Judge worked solutions as the search would judge them, and print the share that is right.

    Limits that cut good solutions teach a model to write short ones. Under 95 % the flags to raise
    are named; InputError under 50 %.
    """
    fates = Counter(solution_fate(one, tokenizer, search, context) for one in questions)
    share = 100 * fates["right"] / len(questions)
    others = [f"{count} {name}" for name, count in fates.most_common() if name != "right"]
    text = f"{share:.1f} % of {len(questions)} worked solutions count as right"
    print(f"data check: {text}" + (f"; {', '.join(others)}" if others else ""))
    if share >= 95:
        return
    remedy = {
        "cut": f"raise --max-step-tokens {search.max_step_tokens}",
        "deep": f"raise --max-depth {search.max_depth}",
        "long": f"raise --max-tokens {context} as far as the model's context goes",
        "unparsed": "see that the solutions state their answers after #### or in \\boxed, and "
        "that --steps fits them",
        "wrong": "see that the stated answers are those of the rows",
    }
    worst = next(name for name, _ in fates.most_common() if name != "right")
    if share < 50:
        raise InputError(f"{text} ({', '.join(others)}): {remedy[worst]}")
    print(f"data check: under 95 %: {remedy[worst]}")


def fitting(questions: list[Question], tokenizer: StepTokenizer, room: int) -> list[Question]:
    """The questions whose prompts have at most `room` tokens; the others are counted aloud.

    InputError if none is left.
    """
    if room < 1:
        raise InputError(
            f"the context leaves {room} tokens beside a step: use a lower --max-step-tokens"
        )
    kept = [one for one in questions if len(tokenizer.encode_prompt(one)) <= room]
    if questions and not kept:
        tokenizer.encode_prompt(questions[0], room)
    if len(kept) < len(questions):
        print(
            f"{len(questions) - len(kept)} questions have prompts of more than {room} tokens, what "
            "the context leaves beside a step; left out"
        )
    return kept


def write_trees(file: Path, trees: Iterable[Tree], mode: str = "a"):
    """Append trees, one JSON line each, as they come; with mode "w" they replace the file."""
    open(file, mode).close()
    for tree in trees:
        append(file, json.dumps(sealed(dataclasses.asdict(tree))) + "\n")
    sync(file)


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def node_problem(index: int, node: TreeNode) -> str:
    """What is wrong with a stored node; empty if nothing is."""
    known = type(node.parent) is int and -1 <= node.parent < index
    if not known or (node.parent >= 0) != (index > 0):
        return f"its parent is {node.parent!r}, not a node before it"
    tokens = node.tokens if isinstance(node.tokens, list) else []
    if not tokens or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        return "it has no tokens, or other things than token ids"
    marks = node.sampled if isinstance(node.sampled, list) else []
    if len(marks) != len(tokens) or not all(type(mark) is bool for mark in marks):
        return "'sampled' is not true or false for each token"
    values = [node.q_value, node.value, *([] if node.reward is None else [node.reward])]
    valued = all(is_number(value) and abs(value) < 1 + 1e-6 for value in values)
    counted = type(node.visit_count) is int and 0 <= node.visit_count < 2**31
    if not counted or not valued or not is_number(node.logp) or not is_number(node.prior):
        return "logp, prior, q_value, value, reward or visit_count is not a number that it can be"
    if node.ending is not None and not isinstance(node.ending, str):
        return "'ending' is not text"
    return ""


def read_node(index: int, row: dict) -> TreeNode:
    """A stored node. What may be missing: `sampled` (all but the prompt), Q (the reward), the
    visits (one, if there is a Q or a reward), and the fields that have a default."""
    known = {"sampled": [index > 0] * len(row["tokens"])}
    if row.get("q_value", row.get("reward")) is not None:
        known |= {"q_value": row.get("reward"), "visit_count": 1}
    return TreeNode(**known | row)


def read_trees(file: str | Path, content: bytes | None = None) -> list[Tree]:
    """All trees of a JSONL file; InputError names the line of a bad one."""
    trees = []
    known = {}
    for number, row in read_rows(Path(file), content=content):
        where = f"{file}, line {number}"
        try:
            tree = Tree(**{**row, "nodes": list(starmap(read_node, enumerate(row["nodes"])))})
            for node in tree.nodes:  # equal ids as one object: a third of the memory
                node.tokens = [known.setdefault(token, token) for token in node.tokens]
        except (TypeError, KeyError) as error:
            raise InputError(f"{where}: not a tree ({error})")
        texts = (tree.id, tree.question, tree.answer, tree.stopped)
        typed = type(tree.simulations) is int and all(type(text) is str for text in texts)
        if tree.version != 1 or not tree.nodes or not typed:
            raise InputError(
                f"{where}: version is not 1, there are no nodes, "
                "or a field of the tree is of the wrong type"
            )
        for index, node in enumerate(tree.nodes):
            problem = node_problem(index, node)
            if problem:
                raise InputError(f"{where}, node {index}: {problem}")
        check_size(tree, where)
        trees.append(tree)
    return trees


def check_size(tree: Tree, where: str):
    """Refuse a tree with more tokens or siblings than there is memory to train on."""
    if tree.tokens() > MOST_TOKENS:
        raise InputError(f"{where}: the tree has {tree.tokens()} tokens, at most {MOST_TOKENS} fit")
    siblings = Counter(node.parent for node in tree.nodes)
    pairs = sum(count * (count - 1) // 2 for count in siblings.values())
    if pairs > MOST_PAIRS:
        raise InputError(f"{where}: {pairs} pairs of siblings, at most {MOST_PAIRS} are compared")


def check_token_ids(trees: list[Tree], vocabulary: int, file: str | Path):
    """Refuse trees with token ids that a model of this vocabulary does not have."""
    for tree in trees:
        if max(token for node in tree.nodes for token in node.tokens) >= vocabulary:
            raise InputError(
                f"{file}: the tree of question {tree.id} holds token ids of {vocabulary} and more, "
                "which this model does not have"
            )


def rank_files(file: Path) -> dict[Path, int]:
    """`file` and the files of ranks beside it (stem-RANK.suffix), with the rank of each.

    A file that has a configuration of its own is another search, not a rank of this one.
    """
    found = {}
    pattern = f"{glob.escape(file.stem)}*{glob.escape(file.suffix)}"
    for other in sorted(file.parent.glob(pattern)):
        middle = other.name.removeprefix(file.stem).removesuffix(file.suffix)
        match = re.fullmatch(r"(?:-(\d+))?", middle)
        own_search = other != file and other.with_name(other.name + ".config").exists()
        if match and not own_search:
            found[other] = int(match[1] or 0)
    return found


def resume_trees(file: Path, rank: int = 0, ranks: int = 1) -> list[Tree]:
    """The trees of `file` and of every rank's file beside it, which may be of another rank count.

    This rank cuts a torn last line off the files that are its own, and says so. A file that another
    rank may be writing is read as far as it is whole.
    """
    trees = {}
    for other, owner in rank_files(file).items():
        content = read_file(other)
        whole = content.rfind(b"\n") + 1
        found = read_trees(other, content[:whole])
        torn = content[whole:]
        if not torn.startswith(BEGINNING) and not BEGINNING.startswith(torn):
            raise InputError(f"{other}: its last line is not a tree's; it is left as it is")
        if owner % ranks == rank and torn:
            os.truncate(other, whole)
            print(f"{other}: the last line was torn and is cut off; its question is searched again")
        doubled = sum(tree.id in trees for tree in found)
        if doubled:
            print(f"{other}: {doubled} questions already have a tree elsewhere; keeping the first")
        trees = {tree.id: tree for tree in found} | trees
    return list(trees.values())


# ----------------------------------------------------------------------------- what a command names

# the defaults that replace those of the dataclasses where --data names a built-in task
BUILT_IN = Recipe(
    "built-in task",
    {
        # mcts.SearchConfig
        "simulations": 12,
        "max_depth": 5,
        "max_step_tokens": 16,
        "search_temperature": 0.7,
        "tree_tokens": 880,
        "search_rows": 128,
        # eval.AnswerConfig
        "answer_temperature": 0.3,
        "answer_lanes": 512,
        # svpo.LossConfig
        "policy_weight": 0.05,
        "sft_weight": 1.0,
        # train.RunConfig and train.TrainConfig
        "rounds": 2,
        "sft_steps": 2000,
        "sft_batch": 32,
        "sft_lr": 3e-3,
        "tune_batch": 8,
        "tune_lr": 5e-4,
    },
    lambda flags: is_built_in(flags["data"]),
)

# the defaults for real models and questions
REAL = Recipe(
    "real model",
    {
        "dtype": "auto",
        # mcts.SearchConfig: AlphaMath's search, with limits that 98 % of MATH's solutions fit in
        "simulations": 40,
        "expand_width": 5,
        "max_depth": 64,
        "max_step_tokens": 512,
        "max_tokens": 2048,
        "tree_tokens": 8192,
        # eval.AnswerConfig
        "answer_lanes": 512,
        # train.RunConfig and train.TrainConfig
        "rounds": 3,
        "sft_epochs": 2,
        "sft_batch": 64,
        "tune_batch": 64,
        "recompute": True,
    },
    lambda flags: not is_built_in(flags["data"]),
)
RECIPES = (BUILT_IN, REAL)


@dataclass(frozen=True)
class SourceConfig:
    """Which model, on which questions."""

    model: str = flag("", "model folder, preset or repository id")
    data: str = flag(
        "",
        "arithmetic or deduction (built in), with :SPLIT if not test; or datasets (NAME, "
        "NAME:SPLIT or NAME:FILE) and JSONL files of questions",
        many=True,
    )
    data_dir: str = flag("", "folder of datasets, NAME/SPLIT.jsonl; empty: they are downloaded")
    prompt: str = flag("", "file with the text around {question}")
    chat: bool = flag(False, "put the prompt into the model's chat template")
    steps: str = flag(
        "",
        "what ends a step: a line, a blank line (paragraphs), or XML: <step> with <p>, <code> and "
        "<output>; empty: the dataset's",
        choices=tuple(STEP_FORMATS),
    )
    tools: str = flag(
        "none",
        "python: code in XML steps runs, and its output is added",
        choices=("none", "python"),
    )
    limit: int = flag(0, "use the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(
        0, "seed of sampling, of a missing value head, and of the questions of mcts.py"
    )
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag(
        "float32",
        "of weights and computing; auto: bfloat16 where the device multiplies in it",
        choices=("auto", "float32", "bfloat16"),
    )


def step_format(source: SourceConfig) -> StepFormat:
    """The format that --steps names, else that of the datasets of --data."""
    if source.steps:
        return STEP_FORMATS[source.steps]
    if is_built_in(source.data):
        return LINES
    words = split_words(source.data)
    formats = {DATASETS[locate(word, source.data_dir)[0]].steps for word in words}
    if len(formats) > 1:
        raise InputError(f"--data {source.data}: these end steps differently; choose --steps")
    return formats.pop() if formats else LINES


def find_source(source: SourceConfig) -> tuple[Path, StepTokenizer]:
    """The folder of the model that a command names, and its tokenizer with the prompt template."""
    folder = find_folder(source.model)
    steps = step_format(source)
    tools = source.tools == "python"
    if tools and steps is not XML:
        raise InputError("--tools python needs --steps xml: other steps have no code blocks")
    if tools:
        check_sandbox()
    chat = chat_template(folder) if source.chat else None
    template = read_template(source.prompt)
    # read before the weights: a tokenizer of another model is told by its size
    tokenizer = StepTokenizer.load(folder, template, chat=chat, steps=steps, tools=tools)
    if not (folder / "value_head.safetensors").exists():
        print(f"{folder} has no value head; a random one is used, and its rankings are random")
    return folder, tokenizer
