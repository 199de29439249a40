"""Generated and damaged input to all that reads what strangers wrote: no traceback, nothing slow.

300 inputs each; with `SVPO_LONG=1` 100,000.
"""

import contextlib
import json
import time

import pytest
from conftest import LONG, ROOT, tiny_config
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from data import DATASETS, LINES, load_questions, read_solutions, read_trees, resume_trees
from model import Llama, read_config, save_model
from support.flags import InputError
from svpo import LossConfig, learn, pack
from tasks.code_steps import split_xml
from tasks.exact import evaluate
from tasks.grading import compare_answers, extract_answer, split_parts
from tasks.notation import normalise

COUNT = 100_000 if LONG else 300
SHARED = ROOT.parent / "shared" / "data"
# fmt: off
PIECES = [
    "####", "\\boxed{", "}", "{", "\\frac", "\\sqrt", "\\left(", "\\right)", "^", "_", "9", "-",
    ",", ".", "1/2", " ", "\n", "$", "%", "\\text{", "x", "=", "(", ")", "[", "]", "\\pi",
    "The answer is", "Final Answer:", "\\begin{pmatrix}", "\\\\", "&", "\\cup", "\\infty", "\x00",
    "\u202e", "\x85", "e", "E", "+", "*", "<code>", "</code>", "<output>", "</output>", "<step>",
    "</step>", "</p>", "\ufeff", "٣", "½", "9" * 50,
]
# fmt: on
text = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
every_check = list(HealthCheck)
fuzz = settings(max_examples=COUNT, deadline=2000, database=None, suppress_health_check=every_check)


def lists_and_objects(inner):
    keys = st.text(max_size=8)
    return st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)


plain_value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_value = st.recursive(plain_value, lists_and_objects, max_leaves=8)


@fuzz
@seed(0)
@given(text, text)
def test_grading(prediction, answer):
    """Catches a grader that trips, or takes long, over an answer of any text."""
    extract_answer(prediction)
    evaluate(normalise(prediction))
    split_parts(normalise(prediction))
    equal, stage = compare_answers(prediction, answer)
    assert stage in ("none", "text", "number", "algebra") and (not equal or prediction.strip())
    itself, _ = compare_answers(prediction, prediction)
    assert itself == bool(prediction.strip())


@fuzz
@seed(0)
@given(text)
def test_steps_of_xml(solution):
    """Catches steps that lose text, and a splitter that trips."""
    parts = [part for step in split_xml(solution) for part, _ in step]
    assert "".join(parts).split() == solution.split()


def damaged(row: dict, change) -> str:
    """A JSON line with one value replaced, at any depth, or its text cut or changed."""
    place, kind, value = change
    spots = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    row = json.loads(json.dumps(row))
    walk(row)
    node, key = spots[place % len(spots)]
    if kind == "replace":
        node[key] = value
    elif kind == "remove":
        del node[key]
    line = json.dumps(row)
    if kind == "cut":
        line = line[: place % (len(line) + 1)]
    elif kind == "insert":
        line = line[: place % len(line)] + str(value) + line[place % len(line) :]
    return line


def damaged_file(file, row: dict, change):
    """A file of one damaged line."""
    file.write_text(damaged(row, change) + "\n", encoding="utf-8", errors="surrogatepass")


kinds = st.sampled_from(["replace", "remove", "cut", "insert"])
changes = st.tuples(st.integers(0, 10**6), kinds, json_value)
STEP = {"tokens": [3, 4], "sampled": [True, True], "logp": -1.5, "prior": 0.4, "visit_count": 2}
STEP["value"] = 0.1
TREE = {
    "id": "t",
    "question": "?",
    "answer": "1",
    "simulations": 3,
    "stopped": "simulations",
    "version": 1,
    "nodes": [
        {"parent": -1, "tokens": [1, 2], "sampled": [False, False]},
        {"parent": 0, **STEP, "q_value": 0.5, "reward": None, "ending": None},
        {"parent": 0, **STEP, "q_value": -1.0, "reward": -1.0, "ending": "answer"},
        {"parent": 1, **STEP, "q_value": 1.0, "reward": 1.0, "ending": "answer"},
    ],
}


@fuzz
@seed(0)
@given(changes)
def test_trees(tmp_path_factory, change):
    """Catches damaged trees that are read, and then trip in the packer or an objective."""
    path = tmp_path_factory.getbasetemp() / "trees.jsonl"
    damaged_file(path, TREE, change)
    with contextlib.suppress(InputError):
        lessons = []
        for tree in read_trees(path):
            for objective in ("svpo", "dpo", "rft", "grpo"):
                lessons.append(learn(tree, LossConfig(objective)))
        if lessons:
            pack([lesson.tree for lesson in lessons])
    with contextlib.suppress(InputError):
        resume_trees(path)


QUESTION = {
    "question": "1+1?",
    "answer": "1+1=2\n#### 2",
    "solution": "1+1=2 #### 2",
    "id": "a",
    "level": 3,
}
PROBLEM = {"problem": "What is $1+1$?", "solution": "$\\boxed{2}$", "answer": "2", "unique_id": "u"}
ROWS = {  # a row of each dataset
    "plain": QUESTION,
    "gsm8k": QUESTION,
    "math": PROBLEM,
    "math500": PROBLEM,
    "svamp": {"Body": "Two apples.", "Question": "How many?", "Answer": 2.0, "ID": "s"},
    "mawps": {"input": "1?", "target": 1.0},
    "prontoqa": {"question": "q", "answer": [{"text": "a #### True"}]},
}


SOLVED = [
    {"id": "gsm8k-0", "problem": "1+1?", "steps": ["a", "b"], "label": 1},
    {"prompt": "1+1?", "completions": ["a", "b"], "labels": [True, False]},
    {"question": "1+1?", "options": ["1", "2"], "body": "x", "response": "a\nb", "label": 0},
    ROWS["gsm8k"],
]


def test_undamaged_rows_are_read(tmp_path):
    """Catches rows below that are refused before they are damaged, and so test nothing, and a
    dataset without a row."""
    assert ROWS.keys() == DATASETS.keys()
    for name, row in ROWS.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        assert len(load_questions(f"{name}:{tmp_path}/rows.jsonl")) == 1


@fuzz
@seed(0)
@given(st.sampled_from(sorted(ROWS)), st.booleans(), changes)
def test_questions(tmp_path_factory, name, named, change):
    """Catches rows of questions that trip the reader of their dataset, or that of a plain file."""
    path = tmp_path_factory.getbasetemp() / "questions.jsonl"
    damaged_file(path, ROWS[name], change)
    with contextlib.suppress(InputError):
        for question in load_questions(f"{name}:{path}" if named else str(path)):
            assert isinstance(question.text, str) and isinstance(question.answer, str)


@fuzz
@seed(0)
@given(st.sampled_from(SOLVED), changes)
def test_solutions(tmp_path_factory, row, change):
    """Catches rows of solutions that trip their reader, or whose label is of no step."""
    path = tmp_path_factory.getbasetemp() / "solutions.jsonl"
    damaged_file(path, row, change)
    with contextlib.suppress(InputError):
        for question, label in read_solutions(path, LINES):
            steps = LINES.steps(question.solution)
            assert isinstance(question.text, str) and steps
            assert label is None or -1 <= label < len(steps)


@fuzz
@seed(0)
@given(changes)
def test_configs(tmp_path_factory, change):
    """Catches fields of config.json that trip the reader, or that it lets through to trip the
    model."""
    folder = tmp_path_factory.getbasetemp() / "config"
    if not folder.exists():
        save_model(Llama(tiny_config()), folder)
        (folder / "config.json").rename(folder / "whole.json")
    row = json.loads((folder / "whole.json").read_text())
    damaged_file(folder / "config.json", row, change)
    with contextlib.suppress(InputError):
        read_config(folder)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the files in ../shared/data")
def test_damaged_real_rows(tmp_path):
    """Catches rows of the published benchmarks, cut anywhere, that trip the reader or the grader,
    or take long."""
    rows = []
    for file in sorted(SHARED.glob("*/*.jsonl")):
        dataset = file.parent.name if file.parent.name in DATASETS else "plain"
        lines = file.read_text(encoding="utf-8").splitlines()[:2000]
        rows += [(dataset, line) for line in lines]
    path = tmp_path / "rows.jsonl"
    for number in range(min(COUNT, 20000)):
        dataset, line = rows[number * 7919 % len(rows)]
        end = '"}' if number % 3 == 0 else ""
        text = line[: number * 104729 % len(line)] + end + "\n"
        path.write_text(text, encoding="utf-8")
        begin = time.monotonic()
        with contextlib.suppress(InputError):
            for question in load_questions(f"{dataset}:{path}"):
                stated = extract_answer(question.solution or question.text)
                compare_answers(stated, question.answer)
        assert time.monotonic() - begin < 4
