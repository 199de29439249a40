"""Questions, splits, answers, tokens and tree files."""
import json
import random
from pathlib import Path

import pytest

import data
from data import InputError, Question, StepTokenizer, extract_answer, is_correct, load_questions, read_trees, solution_tree
from tasks import published
from tasks.arithmetic import MODULUS
from tasks.questions import SPLITS, generate, split_of, task_tokenizer

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def test_splits_are_disjoint_for_every_seed_and_size():
    """Catches a test question that is trained on or searched, whatever the seed and the counts."""
    texts = {name: {question.text for seed in range(4) for question in generate("arithmetic", name, 400, seed)} for name in SPLITS}
    for name, own in texts.items():
        assert all(split_of(text) == name for text in own)
        assert not own & set().union(*(other for key, other in texts.items() if key != name))
    assert sum(len(owned) for owned in SPLITS.values()) == 256


def test_questions_are_reproducible_and_right():
    """Catches answers that disagree with Python's own precedence, and questions that depend on global random state."""
    random.seed(1)
    first = generate("arithmetic", "test", 200, 5)
    random.seed(2)
    assert first == generate("arithmetic", "test", 200, 5) and len({question.text for question in first}) == 200
    for question in first:
        assert int(question.answer) == eval(question.text) % MODULUS
        assert question.solution is None


def test_the_teacher_computes_well_but_takes_any_order():
    """Catches demonstrations with wrong arithmetic, and a teacher who follows the rules or never hits the right answer."""
    questions = generate("arithmetic", "sft", 300, 0)
    right = 0
    for question in questions:
        for line in question.solution.splitlines():
            operation, value = line.split(" ")[0].split("=")
            assert eval(operation) % MODULUS == int(value)
        right += is_correct(extract_answer(question.solution), question.answer)
    assert 0.25 < right / len(questions) < 0.75


@pytest.mark.parametrize("text, answer", [
    ("so\n#### 1,234", "1,234"), ("The answer is 12.", "12"), ("the final answer is: $5\nmore", "$5"),
    ("#### 1\n#### 2", "2"), ("no answer here", None), ("####", None), ("#### \n5", None)])
def test_extract_answer(text, answer):
    """Catches answers read from the wrong line, and "no answer" taken for an answer."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize("prediction, answer, same", [
    ("18", "18.0", True), ("$1,234", "1234", True), ("1/2", "0.5", True), ("36/2", "18", True), ("5 apples", "5", True),
    ("18", "19", False), ("0.333", "1/3", False), (None, "1", False), ("", "1", False), ("-3", "3", False), ("x", "x", True),
    ("2x+1", "2y", False), ("10 or 12", "10", False), ("3^2", "3", False), ("1,23", "1", False), ("1e3", "1", False),
    ("-$5", "-5", True), ("$-5", "-5", True), ("$ 5", "5", True), ("50%", "50", True), ("5.", "5", True), ("2 dollars.", "2", True),
    ("1.5/2", "0.75", True), (".", "0", False), ("12 3", "12", False), ("1/0", "1", False), ("9" * 5000, "1", False), (".5", "0.5", True), ("1e999999999", "1", False)])
def test_is_correct(prediction, answer, same):
    """Catches string equality, float rounding, division by zero and numbers that take for ever."""
    assert is_correct(prediction, answer) is same


def test_split_sizes():
    """Catches a stated capacity that is not the counted one, and a request for more questions that never ends."""
    from itertools import product
    counted = dict.fromkeys(SPLITS, 0)
    for a, x, b, y, c, z, d in product(range(1, 7), "+-*", range(1, 7), "+-*", range(1, 7), "+-*", range(1, 7)):
        counted[split_of(f"{a}{x}{b}{y}{c}{z}{d}")] += 1
    with pytest.raises(InputError, match="only 2094"):
        generate("arithmetic", "valid", 2095, 0)


def test_jsonl_questions(tmp_path):
    """Catches GSM8K's answer format misread, ids not kept, and a limit that is off by one."""
    rows = [{"question": "a?", "answer": "step\n#### 1,000"}, {"question": "b?", "answer": 14.0, "id": "own"}, {"question": "c?", "answer": "x"}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    questions = load_questions(str(path), 2)
    assert questions == [Question("some-1", "a?", "1,000", "step\n#### 1,000"), Question("own", "b?", "14.0", None)]


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not valid JSON"), ('{"question": "x", "answer": ' + "9" * 5000 + "}", "line 2: not valid JSON"),
    ("[" * 100000, "line 2: not valid JSON"), ("[1]", "line 2: a JSON object"), ('{"question": "x"}', "line 2: needs a non-empty 'answer'"),
    ('{"question": "", "answer": "1"}', "line 2: needs a non-empty 'question'"), ('{"question": "x", "answer": "#### "}', "line 2: no answer"),
    ('{"question": "x", "answer": "1", "solution": 3}', "line 2: 'solution'"), ('{"question": "x", "answer": "1", "id": "q"}', "line 2: id 'q'")])
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
    assert [tokenizer.tokenizer.decode(node.tokens, skip_special_tokens=False) for node in tree.nodes] == [
        "1+2*3\n", "2*3=6 -> 1+6\n", "1+6=0 #### 0<eos>"]
    assert [any(node.sampled) for node in tree.nodes] == [False, True, True]


def test_step_ends_inside_tokens():
    """Catches byte-pair tokens that swallow the line break, and blank lines taken for steps."""
    from tokenizers import Tokenizer, decoders, models
    words = {"<eos>": 0, "a": 1, ".\n": 2, "\n": 3, "\n\n": 4, "\nb": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    steps = StepTokenizer(tokenizer, [0])
    eos, breaks, text, before = steps.tables_4V.tolist()
    assert breaks == [False, False, True, True, True, True] and text == [True, True, True, False, False, True]
    assert before == [True, True, True, False, False, False] and eos == [True] + [False] * 5


def test_a_torn_last_line_is_cut_off(tmp_path, capsys):
    """Catches a search that cannot go on after a kill, and one that loses whole trees or keeps quiet about it."""
    row = json.dumps({"id": "t", "question": "?", "answer": "1", "nodes": [{"parent": -1, "tokens": [1], "sampled": [False]}]})
    path = tmp_path / "trees.jsonl"
    assert data.resume_trees(path) == []
    for torn in ("", row[:30], row):
        path.write_text(row + "\n" + torn)
        assert len(data.resume_trees(path)) == 1 and path.read_text() == row + "\n"
        assert ("torn" in capsys.readouterr().out) == bool(torn)


@pytest.mark.parametrize("change, message", [
    ({"version": 2}, "version"), ({"nodes": []}, "version is not 1"), ({"nodes": [{"parent": 0, "tokens": [1], "sampled": [True]}]}, "parent"),
    ({"nodes": [{"parent": -1, "tokens": [], "sampled": []}]}, "no tokens"), ({"extra": 1}, "not a tree")])
def test_malformed_trees_are_refused(tmp_path, change, message):
    """Catches trees with cycles, without tokens or of another version that reach training."""
    row = {"id": "t", "question": "?", "answer": "1", "nodes": [{"parent": -1, "tokens": [1], "sampled": [False]}]}
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert len(read_trees(path)) == 1
    path.write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(InputError, match=message):
        read_trees(path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the GSM8K files in ../shared/data")
def test_gsm8k_answers_grade_themselves():
    """Catches answers of the real data that the reader or the grader cannot parse, or calls equal to a neighbour's."""
    questions = load_questions(str(SHARED / "gsm8k" / "test.jsonl"))
    assert len(questions) == 1319 and all(question.solution for question in questions)
    for question, other in zip(questions, questions[1:]):
        assert is_correct(extract_answer(question.solution), question.answer)
        if float(question.answer.replace(",", "")) != float(other.answer.replace(",", "")):
            assert not is_correct(other.answer, question.answer)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the files of ../shared/data")
def test_benchmarks():
    """Catches published rows misread: counts, the first question and answer of each, worked solutions, own ids, several at once."""
    wanted = {"gsm8k": (7473, "72", True), "gsm8k:test": (1319, "18", True), "math:test": (5000, "2", True), "math": (7498, None, True), "svamp": (1000, "145", False),
              "mawps": (562, "14", False), "mawps:multiarith": (600, None, False), "prontoqa": (1000, None, True)}
    for spec, (count, answer, solved) in wanted.items():
        questions = load_questions(spec, data_dir=str(SHARED))
        assert len(questions) == len({question.id for question in questions}) == count
        assert answer in (None, questions[0].answer) and all(bool(question.solution) == solved for question in questions)
        assert all(is_correct(extract_answer(question.solution), question.answer) for question in questions[:200] if solved)
    assert "<<" not in load_questions("gsm8k", 5, data_dir=str(SHARED))[0].solution
    assert {question.answer for question in load_questions("prontoqa", data_dir=str(SHARED))} == {"true", "false"}
    assert len(load_questions("gsm8k math:test", 3, data_dir=str(SHARED))) == 6
    assert load_questions("svamp", 1, data_dir=str(SHARED))[0].text.endswith("into 93 groups. How big is each group of bananas?")


def test_benchmarks_that_are_not_there(tmp_path, monkeypatch):
    """Catches tracebacks and half-written downloads where a file or the network is missing."""
    with pytest.raises(InputError, match="the splits of gsm8k are train, test"):
        load_questions("gsm8k:dev", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="gsm8k/train.jsonl does not exist"):
        load_questions("gsm8k", data_dir=str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(published.BENCHMARKS, "gsm8k", (("train",), (tmp_path / "far.jsonl").as_uri()))
    with pytest.raises(InputError, match="could not be read .* put the file at"):
        load_questions("gsm8k")
    (tmp_path / "far.jsonl").write_text('{"question": "?", "answer": "1 #### 2"}\n')
    assert [(question.id, question.answer) for question in load_questions("gsm8k")] == [("gsm8k-train-1", "2")]
    assert [path.name for path in (tmp_path / "svpo" / "gsm8k").iterdir()] == ["train.jsonl"]
    with pytest.raises(InputError, match="no public address"):
        load_questions("prontoqa")


def test_deduction_questions():
    """Catches a task whose right answer does not follow, whose teacher never errs or always does, splits that share questions, and a
    tokenizer that loses text."""
    from tasks.deduction import sound
    tokenizer, right, wholly = task_tokenizer("deduction"), [], []
    for question in generate("deduction", "sft", 500, 0):
        assert split_of(question.text) == "sft"
        text = f"{question.text}\n{question.solution}"
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        right.append(extract_answer(question.solution) == question.answer)
        wholly.append(all(sound(question.text, question.solution)))
        *rules, fact, goal = question.text.replace(":", "").replace("?", "").split(" ")
        known = {fact}
        for _ in range(3):
            known |= {rule.partition(">")[2] for rule in rules if rule.partition(">")[0] in known}
        assert {concept for concept in known if concept.strip("~") == goal} == {"~" * (question.answer == "no") + goal}  # it follows, and only it
    assert 0.45 < sum(right) / 500 < 0.62 and 0.02 < sum(wholly) / 500 < 0.12
    assert sound("a>b b>~c d>b a: c?", "a>b\nb>~c #### no") == [True, True]
    assert sound("a>b b>~c d>b a: c?", "a>b\nd>b\nb>~c #### no") == [True, False, False]
    assert sound("a>b b>~c d>b a: c?", "a>b #### no") == [False] and sound("a>b b>~c d>b a: c?", "a>b\nb>~c #### yes") == [True, False]
    assert not {question.text for question in generate("deduction", "test", 300, 0)} & {question.text for question in generate("deduction", "search", 300, 0)}
