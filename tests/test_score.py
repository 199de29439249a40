"""V as a product: files with solutions, V after each step, and F1 of the first wrong step."""

import gzip
import json
import random

import pytest
import torch
from conftest import ROOT, redraw, tiny_config
from test_train import command

from data import LINES, PARAGRAPHS, XML, Question, StepTokenizer, load_questions, read_solutions
from eval import best_threshold, first_error, first_errors, value_rows
from experiments.first_errors import labelled
from model import Llama, save_model
from support.flags import InputError
from tasks.built_in import task_tokenizer


def write(file, *rows: dict):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_f1_by_hand():
    """Catches a first step that is counted from 1, a last step below the threshold in place of the
    first, V at the threshold that counts as wrong, and an F1 over steps or over all solutions."""
    assert first_error([0.5, -0.1, -0.9], 0.0) == 1 and first_error([0.5, 0.0], 0.0) == -1
    rows = [
        (1, [0.8, -0.2, -0.9]),  # found
        (2, [0.8, -0.2, -0.9]),  # one step too early
        (0, [0.3, 0.2]),  # missed
        (0, [-0.3, 0.2]),  # found
        (-1, [0.9, 0.1]),  # rightly without
        (-1, [0.9, -0.1]),  # wrongly marked
        (-1, [0.0]),  # rightly without
    ]
    found = first_errors(rows, 0.0)
    assert found["erroneous"]["solutions"] == 4 and found["erroneous"]["accuracy"] == 0.5
    assert found["correct"]["solutions"] == 3
    assert found["correct"]["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert found["erroneous"]["standard_error"] == pytest.approx(0.25)
    # with 0.35 the third is found too, and of the correct ones none is left alone
    assert first_errors(rows, 0.35)["erroneous"]["accuracy"] == 0.75
    assert first_errors(rows, 0.35)["f1"] == 0.0
    alone = first_errors(rows[:2], 0.0)
    assert alone["f1"] is None and alone["correct"]["accuracy"] is None


def test_the_best_threshold_is_the_best():
    """Catches a threshold that is worse than another one, and one whose figures are not its own."""
    rng = random.Random(0)
    for _ in range(60):
        rows = [(-1, [0.5]), (0, [0.1])]
        for _ in range(rng.randrange(1, 12)):
            values = [round(rng.uniform(-1, 1), 2) for _ in range(rng.randrange(1, 5))]
            rows.append((rng.randrange(-1, len(values)), values))
        found = best_threshold(rows)
        tried = [first_errors(rows, n / 200)["f1"] for n in range(-202, 203)]
        assert found["f1"] == pytest.approx(max(tried))
        assert found == first_errors(rows, found["threshold"])


def test_forms_of_files(tmp_path):
    """Catches published forms that are not read: ProcessBench's, TRL's, one text, GSM8K's answers,
    a reference beside the response, choices, and files in gzip or as an array."""
    rows = [
        {"id": "gsm8k-0", "generator": "x", "problem": "A?", "steps": ["a\nb", "c"], "label": 1},
        {"prompt": "B?", "completions": ["a", "b"], "labels": [True, False]},
        {"question": "C?", "response": "a\nb\n", "solution": "the reference"},
        {"Question": "D?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        {"problem": "E?", "solution": ["a", "b"], "label": -1.0, "final_answer_correct": True},
        {"question": "F", "body": "Five", "output": "a", "unique_id": 7, "label": None},
        {"question": "G?", "solution": None},
        {"question": "H?", "options": ["1", "2"], "solution": "B"},
        {"prompt": "I?", "completions": ["a"], "labels": [True]},
    ]
    found = read_solutions(write(tmp_path / "s.jsonl", *rows), LINES)
    questions = [question for question, _ in found]
    assert [label for _, label in found] == [1, 1, None, None, -1, None, None, -1]
    ids = ["gsm8k-0", "s-2", "s-3", "s-4", "s-5", "7", "s-8", "s-9"]
    assert [question.id for question in questions] == ids
    texts = ["A?", "B?", "C?", "D?", "E?", "Five. F", "H?\n(A) 1\n(B) 2", "I?"]
    assert [question.text for question in questions] == texts
    solutions = [["a\nb", "c"], ["a", "b"], "a\nb\n", "1+1=2\n#### 2", ["a", "b"], "a", "B", ["a"]]
    assert [question.solution for question in questions] == solutions
    assert len(read_solutions(tmp_path / "s.jsonl", LINES, 3)) == 3
    (tmp_path / "s.json").write_text(json.dumps(rows))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress((tmp_path / "s.jsonl").read_bytes()))
    for name in ("s.json", "s.jsonl.gz"):
        again = read_solutions(tmp_path / name, LINES)
        assert [label for _, label in again] == [label for _, label in found]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "1", "steps": ["a", " "]}, "'steps' must be text, or a list of texts"),
        ({"question": "1", "solution": {"a": 1}}, "'solution' must be text"),
        ({"question": "1", "completions": [1]}, "'completions' must be text"),
        ({"question": {"stem": "1"}, "solution": "a"}, "'question' must be text or a number"),
        ({"question": "1", "steps": ["a", "b"], "label": 2}, "label is 2, .* has 2 steps"),
        ({"question": "1", "solution": "a\nb", "label": -2}, "label is -2, .* has 2 steps"),
        ({"question": "1", "solution": "a", "label": "good"}, "'label' must be .*, not 'good'"),
        ({"question": "1", "solution": "a", "label": True}, "'label' must be .*, not True"),
        ({"question": "1", "steps": ["a"], "labels": [0]}, "'labels' must have true or false"),
        (
            {"question": "1", "steps": ["a", "b"], "labels": [True]},
            "1 labels, but the solution has 2",
        ),
        ({"question": "1", "solution": "\ud800"}, "unpaired surrogate"),
        ([1], "expected a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    """Catches a traceback, a bad row that is scored, and an error without its line."""
    good = {"question": "1", "solution": "a", "label": 0}
    file = write(tmp_path / "s.jsonl", good, row)
    with pytest.raises(InputError, match=message) as error:
        read_solutions(file, LINES)
    assert str(error.value).startswith(f"{file}, line 2: ") and "\n" not in str(error.value)


def test_lists_of_steps_keep_their_steps():
    """Catches steps of a list that are split or joined where they hold the delimiter, and a last
    step with a delimiter that a text's last step does not have."""

    def split(form, solution):
        return ["".join(text for text, _ in step) for step in form.steps(solution)]

    assert split(LINES, ["a\nb\n", "c"]) == ["a\nb\n", "c"]
    assert split(LINES, ["a", "b"]) == split(LINES, "a\nb\n") == ["a\n", "b"]
    assert (
        split(PARAGRAPHS, ["a\nb", "\nc\n\n"])
        == split(PARAGRAPHS, "a\nb\n\nc")
        == ["a\nb\n\n", "c"]
    )
    text = "<step>a</step>\n<step>b</step>"
    assert split(XML, ["<step>a", "<step>b</step>"]) == ["<step>a</step>", "<step>b</step>"]
    assert [step.strip("\n") for step in split(XML, text)] == ["<step>a</step>", "<step>b</step>"]


def test_values_are_those_of_a_full_forward_pass(model, tokenizer):
    """Catches values of another place or prompt, values that one solution passes to the next,
    steps of a list that differ from those of a text, and a solution that does not fit."""
    tokenizer.template = "1+1\n{question}\n"
    texts = ["2*2=4 -> 1+4\n1+4=5 #### 5", "1+2=3 -> 3*2\n", "1-1\n" * 200]
    solutions = [(Question("a", "1+2*2", "", texts[0]), 1)]
    solutions += [(Question("a", "1+2*2", "", texts[0].split("\n")), None)]
    solutions += [(Question("b", "3*2", "", text), -1) for text in texts[1:]]
    rows = value_rows(model, tokenizer, solutions, -0.2)
    wanted = []
    for text in ("1+1\n1+2*2\n2*2=4 -> 1+4\n", "1+1\n1+2*2\n2*2=4 -> 1+4\n1+4=5 #### 5<eos>"):
        _, value_1T = model(torch.tensor([tokenizer.tokenizer.encode(text).ids]))
        wanted.append(value_1T[0, -1].item())
    assert rows[0]["values"] == pytest.approx(wanted, abs=1e-5)
    assert rows[1]["values"] == pytest.approx(wanted, abs=1e-5) and "label" not in rows[1]
    assert rows[0]["steps"] == rows[1]["steps"] == ["2*2=4 -> 1+4\n", "1+4=5 #### 5"]
    assert rows[0]["value"] == rows[0]["values"][-1] and rows[0]["label"] == 1
    assert len(rows[2]["values"]) == 1 and [row["id"] for row in rows] == ["a", "a", "b", "b"]
    assert rows[3]["values"] is rows[3]["value"] is rows[3]["prediction"] is None
    for row in rows[:3]:
        assert row["prediction"] == first_error(row["values"], -0.2)
    with pytest.raises(InputError, match="solution c: end-of-text, or a word that the tokenizer"):
        value_rows(model, tokenizer, [(Question("c", "1+1", "", "good\n2"), None)], 0.0)


def deduction_folder(folder):
    """A small model with random weights for the task deduction."""
    tokenizer = StepTokenizer(task_tokenizer("deduction"), [0])
    config = tiny_config(vocab_size=tokenizer.tokenizer.get_vocab_size())
    save_model(redraw(Llama(config), std=0.3), folder)
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "checksums.json").unlink()


def test_soundness_as_labels(tmp_path):
    """Catches labels of another step, answers without a statement that get one, a file that
    eval.py does not read, and a printed F1 that is not that of the written values."""
    questions = load_questions("deduction:sft", 120, 0)
    answers = []
    for number, question in enumerate(questions):  # the teacher's, who leaps now and then
        stated = None if number % 10 == 9 else "yes"
        answer = {"id": question.id, "text": question.solution, "answer": stated}
        answers.append(answer | {"correct": True})
    by_hand = [
        Question("x", "a>b b>c c>~d e>f f>d a: d?", "no"),
        Question("y", "a>b b>c c>~d e>f f>d a: d?", "no"),
    ]
    texts = ["a>b\n\nb>c\nc>~d #### no", "a>b\nc>~d #### no"]
    for question, text in zip(by_hand, texts):
        answers.append({"id": question.id, "text": text, "answer": "no", "correct": True})
    rows = labelled(answers, [*questions, *by_hand], "teacher")
    assert len(rows) == 110 and [row["label"] for row in rows[-2:]] == [-1, 1]
    assert rows[-2]["steps"] == ["a>b", "b>c", "c>~d #### no"]
    assert {-1, 0, 1} <= {row["label"] for row in rows}
    write(tmp_path / "labelled.jsonl", *rows)
    deduction_folder(tmp_path / "model")
    words = [ROOT / "eval.py", "--model", "model", "--score", "labelled.jsonl"]
    words += ["--dtype", "float32", "--threshold", "0.1"]
    done = command(*words, "--json", "values.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in open(tmp_path / "values.jsonl")]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    wanted = first_errors([(row["label"], row["values"]) for row in found], 0.1)
    first, given, best = done.stdout.splitlines()
    steps = sum(len(row["steps"]) for row in rows)
    assert first == f"values.jsonl: V of {steps} steps, 110 solutions"
    assert given.startswith(f"threshold 0.1: F1 {100 * wanted['f1']:.1f}, right on ")
    assert best.endswith("; the best threshold for these solutions")
    refused = (
        ([], "--score needs --json"),
        (["--json", "labelled.jsonl"], "this is an input, too"),
        (["--json", "values.jsonl", "--score", "absent.jsonl"], "absent.jsonl: no such file"),
    )
    for more, message in refused:
        done = command(*words, *more, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_model_writes_labelled_solutions(tmp_path):
    """Catches a script that only labels what others wrote: it samples, labels and writes."""
    deduction_folder(tmp_path / "model")
    script = ROOT / "experiments" / "first_errors.py"
    words = ["--model", "model", "--out", "labelled.jsonl", "--count", "150"]
    done = command(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "labelled.jsonl")]
    assert f"labelled.jsonl: {len(rows)} solutions of 150" in done.stdout
    for row in rows:
        assert -1 <= row["label"] < len(row["steps"]) and row["problem"].endswith("?")
    assert len(read_solutions(tmp_path / "labelled.jsonl", LINES)) == len(rows)
