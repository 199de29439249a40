"""Generated and damaged input to everything that reads what strangers wrote: no traceback, nothing slow.

300 inputs each; with `SVPO_LONG=1` 100,000.
"""
import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from conftest import LONG, ROOT, tiny_config
from data import load_questions, read_trees, resume_trees
from model import Llama, read_config, save_model
from svpo import InputError, learn, LossConfig, pack
from tasks.grading import elements, extract_answer, grade, normalise, to_number
from tasks.steps import split_xml

COUNT = 100_000 if LONG else 300
SHARED = ROOT.parent / "shared" / "data"
PIECES = ["####", "\\boxed{", "}", "{", "\\frac", "\\sqrt", "\\left(", "\\right)", "^", "_", "9", "-", ",", ".", "1/2", " ", "\n", "$", "%", "\\text{", "x", "=", "(", ")", "[", "]",
          "\\pi", "The answer is", "Final Answer:", "\\begin{pmatrix}", "\\\\", "&", "\\cup", "\\infty", "\0", "\u202e", "\x85", "e", "E", "+", "*", "<code>", "</code>", "<output>",
          "</output>", "<step>", "</step>", "</p>", "\ufeff", "٣", "½", "9" * 50]
text = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
fuzz = settings(max_examples=COUNT, deadline=2000, database=None, suppress_health_check=list(HealthCheck))
json_value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=4)
                          | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


@fuzz
@seed(0)
@given(text, text)
def test_grading(prediction, answer):
    """Catches a grader that trips, or takes long, over an answer of any text."""
    extract_answer(prediction)
    to_number(prediction)
    elements(normalise(prediction))
    equal, stage = grade(prediction, answer)
    assert stage in ("none", "text", "number", "algebra") and (not equal or prediction.strip())
    assert grade(prediction, prediction)[0] == bool(prediction.strip())  # an answer equals itself


@fuzz
@seed(0)
@given(text)
def test_steps_of_xml(solution):
    """Catches steps that lose text, and a splitter that trips."""
    assert "".join("".join(part for part, _ in step) for step in split_xml(solution)).split() == solution.split()


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
        line = line[:place % (len(line) + 1)]
    elif kind == "insert":
        line = line[:place % len(line)] + str(value) + line[place % len(line):]
    return line


changes = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "remove", "cut", "insert"]), json_value)
TREE = {"id": "t", "question": "?", "answer": "1", "simulations": 3, "stopped": "simulations", "version": 1, "nodes": [
    {"parent": -1, "tokens": [1, 2], "sampled": [False, False]},
    *({"parent": parent, "tokens": [3, 4], "sampled": [True, True], "logp": -1.5, "prior": 0.4, "visit_count": 2, "q_value": q, "value": 0.1,
       "reward": reward, "ending": ending} for parent, q, reward, ending in ((0, 0.5, None, None), (0, -1.0, -1.0, "answer"), (1, 1.0, 1.0, "answer")))]}


@fuzz
@seed(0)
@given(changes)
def test_trees(tmp_path_factory, change):
    """Catches damaged trees that are read, and then trip in the packer or an objective."""
    path = tmp_path_factory.getbasetemp() / "trees.jsonl"
    path.write_text(damaged(TREE, change) + "\n", encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        trees = read_trees(path)
        lessons = [learn(tree, LossConfig(objective)) for tree in trees for objective in ("svpo", "dpo", "rft", "grpo")]
        if lessons:
            pack([lesson.tree for lesson in lessons])
    with contextlib.suppress(InputError):
        resume_trees(path)


QUESTION = {"question": "1+1?", "answer": "1+1=2\n#### 2", "solution": "1+1=2 #### 2", "id": "a", "level": 3}
PROBLEM = {"problem": "What is $1+1$?", "solution": "$\\boxed{2}$", "answer": "2", "unique_id": "u"}


@fuzz
@seed(0)
@given(st.sampled_from([QUESTION, PROBLEM, {"Body": "Two apples.", "Question": "How many?", "Answer": 2.0, "ID": "s"}, {"input": "1?", "target": 1.0},
                        {"question": "q", "answer": [{"text": "a #### True"}]}]), changes)
def test_questions(tmp_path_factory, row, change):
    """Catches rows of questions that trip the reader."""
    path = tmp_path_factory.getbasetemp() / "questions.jsonl"
    path.write_text(damaged(row, change) + "\n", encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        assert all(isinstance(question.text, str) and isinstance(question.answer, str) for question in load_questions(str(path)))


@fuzz
@seed(0)
@given(changes)
def test_configs(tmp_path_factory, change):
    """Catches fields of config.json that trip the reader, or that it lets through to trip the model."""
    folder = tmp_path_factory.getbasetemp() / "config"
    if not folder.exists():
        save_model(Llama(tiny_config()), folder)
    row = json.loads((folder / "config.json").read_text()) if not (folder / "whole.json").exists() else json.loads((folder / "whole.json").read_text())
    (folder / "whole.json").write_text(json.dumps(row))
    (folder / "config.json").write_text(damaged(row, change), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        read_config(folder)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the files in ../shared/data")
def test_damaged_real_rows(tmp_path):
    """Catches rows of the published benchmarks, cut anywhere, that trip the reader or the grader, or take long."""
    rows = [line for path in sorted(Path(SHARED).glob("*/*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()[:2000]]
    path = tmp_path / "rows.jsonl"
    for number in range(min(COUNT, 20000)):
        line = rows[number * 7919 % len(rows)]
        path.write_text(line[:number * 104729 % len(line)] + ('"}' if number % 3 == 0 else "") + "\n", encoding="utf-8")
        begin = time.monotonic()
        with contextlib.suppress(InputError):
            for question in load_questions(str(path)):
                grade(extract_answer(question.solution or question.text), question.answer)
        assert time.monotonic() - begin < 4
