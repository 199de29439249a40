"""Questions, splits, answers, what ends a step, tokens and tree files."""

import dataclasses
import gzip
import json
import random
import re
from itertools import product

import pytest
from conftest import ROOT, redraw, tiny_config
from tokenizers import Tokenizer, decoders, models

from data import (
    DATASETS,
    LINES,
    PARAGRAPHS,
    XML,
    Dataset,
    Question,
    SourceConfig,
    StepTokenizer,
    check_solutions,
    load_questions,
    load_splits,
    plain,
    read_trees,
    resume_trees,
    solution_fate,
    solution_tree,
    step_format,
)
from mcts import SearchConfig, search_trees
from model import Llama
from support.flags import InputError, parse_args
from svpo import rescore
from tasks.arithmetic import MODULUS
from tasks.built_in import SPLITS, generate, split_of, task_tokenizer
from tasks.deduction import sound
from tasks.grading import extract_answer, is_correct
from train import RunConfig

SHARED = ROOT.parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the files of ../shared/data")


def drawn(task: str, split: str, count: int, seed: int) -> list[Question]:
    """Questions of a built-in task."""
    return [Question(*row) for row in generate(task, split, count, seed)]


def write_rows(path, rows: list[dict]):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_splits_are_disjoint_for_every_seed_and_size():
    """Catches a test question that is trained on or searched, whatever the seed and the counts."""
    texts = {}
    for name in SPLITS:
        found = [drawn("arithmetic", name, 400, seed) for seed in range(4)]
        texts[name] = {question.text for questions in found for question in questions}
    for name, own in texts.items():
        assert all(split_of(text) == name for text in own)
        assert not own & set().union(*(other for key, other in texts.items() if key != name))
    assert sum(len(owned) for owned in SPLITS.values()) == 256


def test_questions_are_reproducible_and_right():
    """Catches answers that disagree with Python's own precedence, and questions that depend on
    global random state."""
    random.seed(1)
    first = drawn("arithmetic", "test", 200, 5)
    random.seed(2)
    assert first == drawn("arithmetic", "test", 200, 5)
    assert len({question.text for question in first}) == 200
    for question in first:
        assert int(question.answer) == eval(question.text) % MODULUS
        assert question.solution is None


def test_the_teacher_computes_well_but_takes_any_order():
    """Catches demonstrations with wrong arithmetic, and a teacher who follows the rules or never
    hits the right answer."""
    questions = drawn("arithmetic", "sft", 300, 0)
    right = 0
    for question in questions:
        for line in question.solution.splitlines():
            operation, value = line.split(" ")[0].split("=")
            assert eval(operation) % MODULUS == int(value)
        right += is_correct(extract_answer(question.solution), question.answer)
    assert 0.25 < right / len(questions) < 0.75


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so\n#### 1,234", "1,234"),
        ("The answer is 12.", "12"),
        ("the final answer is: $5\nmore", "$5"),
        ("#### 1\n#### 2", "2"),
        ("no answer here", None),
        ("####", None),
        ("#### \n5", None),
    ],
)
def test_extract_answer(text, answer):
    """Catches answers read from the wrong line, and "no answer" taken for an answer."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "prediction, answer, same",
    [
        ("18", "18.0", True),
        ("$1,234", "1234", True),
        ("1/2", "0.5", True),
        ("36/2", "18", True),
        ("5 apples", "5", True),
        ("18", "19", False),
        ("0.333", "1/3", False),
        (None, "1", False),
        ("", "1", False),
        ("-3", "3", False),
        ("x", "x", True),
        ("2x+1", "2y", False),
        ("10 or 12", "10", False),
        ("3^2", "3", False),
        ("1,23", "1", False),
        ("1e3", "1", False),
        ("-$5", "-5", True),
        ("$-5", "-5", True),
        ("$ 5", "5", True),
        ("50%", "50", True),
        ("5.", "5", True),
        ("2 dollars.", "2", True),
        ("1.5/2", "0.75", True),
        (".", "0", False),
        ("12 3", "12", False),
        ("1/0", "1", False),
        ("9" * 5000, "1", False),
        (".5", "0.5", True),
        ("1e999999999", "1", False),
    ],
)
def test_is_correct(prediction, answer, same):
    """Catches string equality, float rounding, division by zero and numbers that take for ever."""
    assert is_correct(prediction, answer) is same


def test_split_sizes():
    """Catches a stated capacity that is not the counted one, and a request for more questions that
    never ends."""
    counted = dict.fromkeys(SPLITS, 0)
    for parts in product("123456", *["+-*", "123456"] * 3):
        counted[split_of("".join(parts))] += 1
    assert counted["valid"] == 2094
    with pytest.raises(InputError, match="only 2094"):
        generate("arithmetic", "valid", 2095, 0)


def test_jsonl_questions(tmp_path):
    """Catches GSM8K's answer format misread, ids not kept, and a limit that is off by one."""
    rows = [
        {"question": "a?", "answer": "step\n#### 1,000"},
        {"question": "b?", "answer": 14.0, "id": "own"},
        {"question": "c?", "answer": "x"},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    questions = load_questions(str(path), 2)
    assert questions == [
        Question("some-1", "a?", "1,000", "step\n#### 1,000"),
        Question("own", "b?", "14", None),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not valid JSON"),
        ('{"question": "x", "answer": ' + "9" * 5000 + "}", "line 2: not valid JSON"),
        ("[" * 100000, "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"question": {"text": "x"}, "answer": "1"}', "line 2: 'question' must be text"),
        ('{"question": "x", "answer": [["1"]]}', "line 2: 'answer' must be text"),
        ('{"question": "x", "answer": "1", "solution": 3}', "line 2: 'solution'"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path, line, message):
    """Catches tracebacks, and rows that are skipped in silence."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "x", "answer": "1", "id": "q"}\n' + line)
    with pytest.raises(InputError, match=message.replace("'", ".")) as error:
        load_questions(str(path))
    assert "bad.jsonl" in str(error.value)


def test_solution_tree_is_one_branch(tokenizer):
    """Catches lost line breaks, a missing end-of-text, and loss on the prompt."""
    question = Question("q", "1+2*3", "0", "2*3=6 -> 1+6\n1+6=0 #### 0")
    tree = solution_tree(question, tokenizer)
    assert [node.parent for node in tree.nodes] == [-1, 0, 1]
    assert [
        tokenizer.tokenizer.decode(node.tokens, skip_special_tokens=False) for node in tree.nodes
    ] == ["1+2*3\n", "2*3=6 -> 1+6\n", "1+6=0 #### 0<eos>"]
    assert [any(node.sampled) for node in tree.nodes] == [False, True, True]


def test_step_ends_inside_tokens():
    """Catches byte-pair tokens that swallow the line break, and blank lines taken for steps."""
    words = {"<eos>": 0, "a": 1, ".\n": 2, "\n": 3, "\n\n": 4, "\nb": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    steps = StepTokenizer(tokenizer, [0])
    eos, breaks, text, before = steps.tables_4V.tolist()
    assert breaks == [False, False, True, True, True, True]
    assert text == [True, True, True, False, False, True]
    assert before == [True, True, True, False, False, False]
    assert eos == [True] + [False] * 5


TREE = {
    "id": "t",
    "question": "?",
    "answer": "1",
    "nodes": [{"parent": -1, "tokens": [1], "sampled": [False]}],
}


def test_a_torn_last_line_is_cut_off(tmp_path, capsys):
    """Catches a search that cannot go on after a kill, and one that loses whole trees or keeps
    quiet about it."""
    row = json.dumps(TREE)
    path = tmp_path / "trees.jsonl"
    assert resume_trees(path) == []
    for torn in ("", row[:30], row):
        path.write_text(row + "\n" + torn)
        assert len(resume_trees(path)) == 1 and path.read_text() == row + "\n"
        assert ("torn" in capsys.readouterr().out) == bool(torn)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version"),
        ({"nodes": []}, "version is not 1"),
        ({"nodes": [{"parent": 0, "tokens": [1], "sampled": [True]}]}, "parent"),
        ({"nodes": [{"parent": -1, "tokens": [], "sampled": []}]}, "no tokens"),
        ({"extra": 1}, "not a tree"),
    ],
)
def test_malformed_trees_are_refused(tmp_path, change, message):
    """Catches trees with cycles, without tokens or of another version that reach training."""
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(TREE) + "\n")
    assert len(read_trees(path)) == 1
    path.write_text(json.dumps({**TREE, **change}) + "\n")
    with pytest.raises(InputError, match=message):
        read_trees(path)


@shared
def test_gsm8k_answers_grade_themselves():
    """Catches answers of the real data that the reader or the grader cannot parse, or calls equal
    to a neighbour's."""
    questions = load_questions(str(SHARED / "gsm8k" / "test.jsonl"))
    assert len(questions) == 1319 and all(question.solution for question in questions)
    for question, other in zip(questions, questions[1:]):
        assert is_correct(extract_answer(question.solution), question.answer)
        if float(question.answer.replace(",", "")) != float(other.answer.replace(",", "")):
            assert not is_correct(other.answer, question.answer)


@shared
def test_published_datasets():
    """Catches published rows misread: counts, the first question and answer of each, worked
    solutions, own ids, several at once."""
    wanted = {
        "gsm8k": (7473, "72", True),
        "gsm8k:test": (1319, "18", True),
        "math:test": (5000, "2", True),
        "math": (7498, None, True),
        "svamp": (1000, "145", False),
        "mawps": (562, "14", False),
        "mawps:multiarith": (600, None, False),
        "prontoqa": (1000, None, True),
    }
    for spec, (count, answer, solved) in wanted.items():
        questions = load_questions(spec, data_dir=str(SHARED))
        assert len(questions) == len({question.id for question in questions}) == count
        assert answer in (None, questions[0].answer)
        assert all(bool(question.solution) == solved for question in questions)
        for question in questions[:200] if solved else []:
            assert is_correct(extract_answer(question.solution), question.answer)
    assert "<<" not in load_questions("gsm8k", 5, data_dir=str(SHARED))[0].solution
    answers = {question.answer for question in load_questions("prontoqa", data_dir=str(SHARED))}
    assert answers == {"true", "false"}
    assert len(load_questions("gsm8k math:test", 3, data_dir=str(SHARED))) == 6
    first = load_questions("svamp", 1, data_dir=str(SHARED))[0]
    assert first.text.endswith("into 93 groups. How big is each group of bananas?")


# A row of each published dataset, the question that it is, and the field that its rows lack.
ROWS = {
    "gsm8k": (
        {"question": "Two pens?", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
        Question("", "Two pens?", "2", "1+1 = 2\n#### 2"),
        None,  # its fields are those of a plain file
    ),
    "math": (
        {"problem": "Two?", "solution": "$\\boxed{2}$", "answer": "2", "unique_id": "u"},
        Question("u", "Two?", "2", "$\\boxed{2}$"),
        "question",
    ),
    "math500": (
        {"problem": "Two?", "solution": "$\\boxed{2}$", "answer": "2", "unique_id": "u"},
        Question("u", "Two?", "2", "$\\boxed{2}$"),
        "question",
    ),
    "svamp": (
        {"ID": "s", "Body": "Two pens. ", "Question": "How many?", "Answer": 2.0},
        Question("s", "Two pens. How many?", "2"),
        "answer",
    ),
    "mawps": ({"input": " 1 and 1? ", "target": 2.5}, Question("", "1 and 1?", "2.5"), "answer"),
    "prontoqa": (
        {"question": "Wet?", "answer": [{"text": "Rain is wet. #### True"}]},
        Question("", "Wet?", "True", "Rain is wet. #### True"),
        "answer",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_is_read_as_the_dataset_that_is_named(tmp_path, name):
    """Catches NAME:FILE, a folder called like the dataset, or NAME with --data-dir that read a
    published file in another way, or not at all."""
    row, question, _ = ROWS[name]
    first = DATASETS[name].splits[0]
    write_rows(tmp_path / "mine" / "rows.jsonl", [row])
    write_rows(tmp_path / name / "rows.jsonl", [row])
    write_rows(tmp_path / name / f"{first}.jsonl", [row])
    for spec, data_dir, identity in (
        (f"{name}:{tmp_path}/mine/rows.jsonl", "", "mine-rows-1"),
        (f"{tmp_path}/{name}/rows.jsonl", "", "rows-1"),
        (name, str(tmp_path), f"{name}-{first}-1"),
        (f"{name}:{first}", str(tmp_path), f"{name}-{first}-1"),
    ):
        (found,) = load_questions(spec, data_dir=data_dir)
        assert vars(found) == {**vars(question), "id": question.id or identity}, spec


@pytest.mark.parametrize(
    "row, text, answer",
    [
        (
            {"body": "Two pens.", "question": "How many?", "answer": "2 (pens)"},
            None,
            "2 (pens)",
        ),  # ASDiv
        ({"problem": "Two?", "solution": "It is $\\boxed{2}$.", "level": "1"}, "Two?", "2"),  # MATH
        ({"problem": "Two?", "solution": "No box here."}, None, None),
        ({"problem": "Two?", "expected_answer": "2"}, "Two?", "2"),  # OpenMathInstruct
        ({"question": "Two?", "final_answer": ["2", "3"]}, "Two?", "2, 3"),  # OlympiadBench
        ({"Problem": "Two?", "Answer": 2}, "Two?", "2"),
        ({"question": "Which?", "answer": ""}, None, None),  # GaoKao2023
        ({"question": " ", "answer": "1"}, None, None),
        (
            {"question": "Which?", "options": ["A)21", "B)22.5"], "rationale": "b", "correct": "B"},
            "Which?\n(A) 21\n(B) 22.5",
            "B",
        ),  # AQuA
        ({"question": "Which?", "choices": ["x", "y"], "answer": 1}, "Which?\n(A) x\n(B) y", "B"),
        ({"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "A"}, None, "A"),
        (
            {
                "question": "Q?",
                "choices": {"label": ["1", "2"], "text": ["x", "y"]},
                "answerKey": "2",
            },
            "Q?\n(1) x\n(2) y",
            "2",
        ),  # ARC
        ({"question": "Q?", "choices": ["x", "y"], "answer": "y"}, "Q?\n(A) x\n(B) y", "B"),
        ({"question": "Q?", "options": "(A) x (B) y", "answer": "B"}, "Q?\n(A) x (B) y", "B"),
        ({"question": "Q?", "choices": ["1", "0"], "answer": "1"}, "Q?\n(A) 1\n(B) 0", "A"),
        ({"question": "Q?", "choices": ["1", "0"], "answer": 1}, "Q?\n(A) 1\n(B) 0", "B"),
        ({"question": "Q?", "options": ["a) x", "b) y"], "correct_answer": "b) y"}, None, "b"),
        ({"question": "Sum?", "answer": 0.1 + 0.2}, "Sum?", "0.3"),
        ({"question": "Sum?", "answer": True}, "Sum?", "True"),
        ({"question": "Sum?", "answer": 1e20}, "Sum?", "1e+20"),
    ],
)
def test_rows_as_they_are_published(tmp_path, row, text, answer):
    """Catches published rows that are refused whole, lose their body or choices, or get another
    answer; a row without a question or an answer is left out."""
    write_rows(tmp_path / "rows.jsonl", [row, {"question": "last", "answer": "0"}])
    *found, last = load_questions(str(tmp_path / "rows.jsonl"))
    assert last.text == "last" and [question.answer for question in found] == [answer] * bool(
        answer
    )
    assert text is None or found[0].text == text


def test_ways_to_store_questions(tmp_path, capsys):
    """Catches arrays, gzip and a byte-order mark that are not read, repeated ids that lose a row or
    take another's, rows left out in silence, and formats that are not said to be convertible."""
    rows = [
        {"question": "a?", "answer": "1", "id": "q"},
        {"question": "b?", "answer": "2", "id": "q"},
    ]
    rows += [{"question": "c?", "answer": "3", "id": "q-2"}, {"question": "d?"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    contents = {
        "lines.jsonl": lines.encode(),
        "array.json": json.dumps(rows, indent=1).encode(),
        "marked.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "small.jsonl.gz": gzip.compress(lines.encode()),
        "small.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = load_questions(str(tmp_path / name))
        assert [question.id for question in found] == ["q", "q-2", "q-2-2"], name
        assert "1 rows left out, without a question or an answer" in capsys.readouterr().out
        assert len(load_questions(str(tmp_path / name), 2)) == 2
    for name, content in {"a.parquet": b"PAR1....", "a.csv": b"question,answer\n1+1,2\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"python -c .import pandas; pandas.read_{name[2:]}"):
            load_questions(str(tmp_path / name))
    for content in (b"[1]", b"[[", b"\x1f\x8b broken", b"[]", b'{"question": "?"}'):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(InputError):
            load_questions(str(tmp_path / "bad.jsonl"))


def test_files_of_several_datasets_at_once(tmp_path):
    """Catches a name that is used for the files after its own, and a file of a dataset that is
    missing and is taken for one of its splits."""
    for name, (row, _, _) in ROWS.items():
        write_rows(tmp_path / f"{name}.jsonl", [row])
    spec = " ".join(f"{name}:{tmp_path / name}.jsonl" for name in ROWS if name != "math500")
    assert [question.answer for question in load_questions(spec)] == ["2", "2", "2", "2.5", "True"]
    missing = "the splits of math are train, test; there is no file 'absent.jsonl' either"
    with pytest.raises(InputError, match=missing):
        load_questions("math:absent.jsonl")


def test_datasets_that_are_not_there(tmp_path, monkeypatch):
    """Catches tracebacks and half-written downloads where a file or the network is missing."""
    with pytest.raises(InputError, match="the splits of gsm8k are train, test"):
        load_questions("gsm8k:dev", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="gsm8k/train.jsonl does not exist"):
        load_questions("gsm8k", data_dir=str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    far = Dataset(DATASETS["gsm8k"].read, ("train",), (tmp_path / "far.jsonl").as_uri())
    monkeypatch.setitem(DATASETS, "gsm8k", far)
    with pytest.raises(InputError, match="could not be read .* put the file at"):
        load_questions("gsm8k")
    (tmp_path / "far.jsonl").write_text('{"question": "?", "answer": "1 #### 2"}\n')
    (question,) = load_questions("gsm8k")
    assert (question.id, question.answer) == ("gsm8k-train-1", "2")
    assert [path.name for path in (tmp_path / "svpo" / "gsm8k").iterdir()] == ["train.jsonl"]
    with pytest.raises(InputError, match="no public address"):
        load_questions("prontoqa")


def test_deduction_questions():
    """Catches a task whose right answer does not follow, whose teacher never errs or always does,
    splits that share questions, and a tokenizer that loses text."""
    tokenizer = task_tokenizer("deduction")
    right = []
    wholly = []
    for question in drawn("deduction", "sft", 500, 0):
        assert split_of(question.text) == "sft"
        text = f"{question.text}\n{question.solution}"
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        right.append(extract_answer(question.solution) == question.answer)
        wholly.append(all(sound(question.text, question.solution)))
        *rules, fact, goal = question.text.replace(":", "").replace("?", "").split(" ")
        known = {fact}
        for _ in range(3):
            known |= {rule.partition(">")[2] for rule in rules if rule.partition(">")[0] in known}
        about_goal = {concept for concept in known if concept.strip("~") == goal}
        assert about_goal == {"~" * (question.answer == "no") + goal}  # it follows, and only it
    assert 0.45 < sum(right) / 500 < 0.62
    assert 0.02 < sum(wholly) / 500 < 0.12
    asked = "a>b b>~c d>b a: c?"
    assert sound(asked, "a>b\nb>~c #### no") == [True, True]
    assert sound(asked, "a>b\nd>b\nb>~c #### no") == [True, False, False]
    assert sound(asked, "a>b #### no") == [False]
    assert sound(asked, "a>b\nb>~c #### yes") == [True, False]
    tested = {question.text for question in drawn("deduction", "test", 300, 0)}
    assert not tested & {question.text for question in drawn("deduction", "search", 300, 0)}


# ------------------------------------------------------------------------------- what ends a step


PIECES = ["<eos>", "a", "b.\n", "\n", "\n\n", "\nc", " "]  # the tokens of the tests below


def pieces_tokenizer() -> Tokenizer:
    """A blank line is one token here, or lies across two, or ends or begins inside others."""
    ids = {piece: index for index, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize(
    "steps, solution, texts",
    [
        (LINES, "one\ntwo\n\n#### 3\n", ["one\n", "two\n", "#### 3"]),
        (LINES, "\n \nonly", ["only"]),
        (PARAGRAPHS, "one\ntwo\n\nthree\n\n#### 3", ["one\ntwo\n\n", "three\n\n", "#### 3"]),
        (PARAGRAPHS, "\n\none\n\n\n\n\ntwo\n\n", ["one\n\n", "two"]),
        (PARAGRAPHS, "one\ntwo", ["one\ntwo"]),
        (PARAGRAPHS, " \n\n ", []),
    ],
)
def test_worked_solutions_are_cut_at_the_delimiter(steps, solution, texts):
    """Catches paragraphs that are cut at every line, empty steps, a last step that ends with a
    blank line where end-of-text follows, and cuts at which a search would not end the step."""
    found = steps.steps(solution)
    assert found == [[(text, True)] for text in texts]
    for text in texts[:-1]:
        ends = [steps.ended(text[:count], text[: count - 1]) for count in range(1, len(text) + 1)]
        assert ends == [False] * (len(text) - 1) + [True]


def test_a_worked_solution_of_paragraphs_as_a_tree():
    """Catches paragraphs that lose their blank line or their inner lines on the way to tokens, and
    end-of-text anywhere but at the end."""
    words = StepTokenizer(task_tokenizer("arithmetic"), [0], steps=PARAGRAPHS)
    solution = "2*3=6 -> 1+6\n1+6=0\n\n0+0=0 #### 0"
    tree = solution_tree(Question("q", "1+2*3", "0", solution), words)
    texts = [words.tokenizer.decode(node.tokens, skip_special_tokens=False) for node in tree.nodes]
    assert texts == ["1+2*3\n", "2*3=6 -> 1+6\n1+6=0\n\n", "0+0=0 #### 0<eos>"]


def test_paragraphs_end_where_they_should():
    """Catches steps that end at a line break, at a blank line before any text, or not at all where
    the blank line lies across two tokens, in a real search; and children that continue from
    another token than the one that ended their parent."""
    tokenizer = pieces_tokenizer()
    words = StepTokenizer(tokenizer, [0], "a{question}", steps=PARAGRAPHS)
    model = redraw(Llama(tiny_config(vocab_size=len(PIECES))), std=0.1).eval()
    config = SearchConfig(
        simulations=12, expand_width=4, max_depth=5, max_step_tokens=12, search_rows=3
    )
    questions = [Question(str(number), "a", "1") for number in range(20)]
    trees = list(search_trees(model, words, questions, config))
    endings = set()  # the last two tokens of steps that a blank line has ended
    lines = 0  # steps with a line break inside
    for node in [node for tree in trees for node in tree.nodes[1:]]:
        texts = [PIECES[token] for token in node.tokens]
        ended = [blank_line_after_text("".join(texts[: count + 1])) for count in range(len(texts))]
        assert not any(ended[:-1]) and "<eos>" not in texts[:-1], texts
        assert ended[-1] or texts[-1] == "<eos>" or node.ending == "cut", texts
        assert node.ending != "cut" or len(texts) == config.max_step_tokens and not ended[-1]
        if ended[-1]:
            assert node.ending in (None, "deep")
            endings.add(tuple(texts[-2:]))
            lines += "\n" in "".join(texts).strip()
    assert {("\n", "\n"), ("b.\n", "\n"), ("b.\n", "\nc"), ("\n", "\nc")} <= endings
    assert {("a", "\n\n"), ("b.\n", "\n\n")} <= endings and lines > 10
    for tree, again in zip(trees, rescore(model, trees)):  # the paths are those that were fed
        scores = [node.logp for node in again.nodes[1:]]
        assert [node.logp for node in tree.nodes[1:]] == pytest.approx(scores, abs=1e-3)


def blank_line_after_text(text: str) -> bool:
    return re.search(r"\S(.|\n)*?\n\n", text) is not None


def test_a_dataset_says_how_its_steps_end(tmp_path, monkeypatch):
    """Catches a dataset's format of steps that is not used, one that overrules --steps, and two
    that differ of which one is taken."""
    monkeypatch.setitem(DATASETS, "proofs", Dataset(plain, ("train",), steps=PARAGRAPHS))
    write_rows(tmp_path / "proofs" / "train.jsonl", [{"question": "?", "answer": "1"}])
    write_rows(tmp_path / "rows.jsonl", [{"question": "?", "answer": "1"}])
    folder = str(tmp_path)
    rows = f"{tmp_path}/rows.jsonl"
    assert step_format(SourceConfig(data="proofs", data_dir=folder)) is PARAGRAPHS
    assert step_format(SourceConfig(data=f"proofs:{rows}")) is PARAGRAPHS
    assert step_format(SourceConfig(data=rows)) is step_format(SourceConfig(data="deduction"))
    assert step_format(SourceConfig(data=rows)) is LINES
    assert step_format(SourceConfig(data="proofs", data_dir=folder, steps="xml")) is XML
    both = f"proofs {rows}"
    with pytest.raises(InputError, match="end steps differently; choose --steps"):
        step_format(SourceConfig(data=both, data_dir=folder))
    assert step_format(SourceConfig(data=both, data_dir=folder, steps="lines")) is LINES


def test_test_questions_are_kept_out_of_training(tmp_path, capsys):
    """Catches test questions that stay in training because of a space or a dollar sign, or because
    --test-limit did not draw them, a limit that counts for each file, and a draw that takes the
    first file alone."""
    train = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    write_rows(tmp_path / "train.jsonl", train + [{"question": "What is 3 - 1?", "answer": "2"}])
    for name, first in (("one", 0), ("two", 5)):
        rows = []
        for n in range(first, first + 5):
            rows.append({"question": f"what is  ${n}+1$ ?", "answer": str(n + 1)})
        write_rows(tmp_path / f"{name}.jsonl", rows)
    files = f"{tmp_path / 'one.jsonl'} {tmp_path / 'two.jsonl'}"
    words = ["--model", "real", "--data", str(tmp_path / "train.jsonl"), "--test-limit", "4"]
    run = train_config(*words, "--test-data", *files.split())
    splits = load_splits(run)
    assert len(splits["search"][0]) == 11 and len(splits["test"]) == 4
    assert "10 training questions are test questions" in capsys.readouterr().out
    seen = set()
    for seed in range(6):
        seen |= {one.id[:3] for one in load_splits(dataclasses.replace(run, seed=seed))["test"]}
    assert seen == {"one", "two"}
    # without --test-data every file gives its last fifth
    held_out = load_splits(train_config("--model", "real", "--data", *files.split()))["test"]
    assert [one.id for one in held_out] == ["one-5", "two-5"]


def train_config(*words) -> RunConfig:
    return parse_args("", (RunConfig,), list(words))[0]


@pytest.mark.parametrize(
    "solution, answer, fate",
    [
        ("1+1=2\n2+3=5 #### 5", "5", "right"),
        ("1+1=2\n2+3=5 #### 6", "5", "wrong"),
        ("1+1=2\n2+3=5", "5", "unparsed"),
        ("1+1+1+1+1+1+1+1=1\n2+3=5 #### 5", "5", "cut"),
        ("1=1\n1=1\n1=1\n1=1 #### 1", "1", "deep"),
        ("1+1=2\n2+2=4\n2+3=5 #### 5", "5", "long"),
    ],
)
def test_worked_solutions_are_judged_as_the_search_would(tokenizer, solution, answer, fate):
    """Catches limits that cut good solutions unnoticed, and a share that counts them as right."""
    search = SearchConfig(max_step_tokens=14, max_depth=3)
    question = Question("q", "1+1+3", answer, solution)
    context = 30 if fate == "long" else 100
    assert solution_fate(question, tokenizer, search, context) == fate


def test_the_data_check_speaks_up(tokenizer, capsys):
    """Catches a check that goes on where most solutions would count as wrong."""
    good = Question("a", "1+1", "2", "1+1=2 #### 2")
    long = Question("b", "1+1", "2", "1+1+1+1+1+1+1=0\n1+1=2 #### 2")
    search = SearchConfig(max_step_tokens=12, max_depth=3)
    check_solutions([good] * 9 + [long], tokenizer, search, 100)
    assert "90.0 % of 10" in (printed := capsys.readouterr().out)
    assert "raise --max-step-tokens 12" in printed
    with pytest.raises(InputError, match=r"25.0 % of 4.*3 cut.*raise --max-step-tokens"):
        check_solutions([good] + [long] * 3, tokenizer, search, 100)
