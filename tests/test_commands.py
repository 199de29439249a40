"""Search from the outside: ranks, interruptions, every strategy, and the benchmark in small."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from data import StepTokenizer, load_questions, read_trees
from model import load_model
from svpo import LossConfig, compared, learn, rescore

QUESTIONS = 300
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture
def work(tmp_path, model_folder):
    """A folder with questions, a prompt and a small model; words that name them."""
    rows = []
    for number in range(QUESTIONS):
        question = f"{number % 7}+{number % 5}*{number % 6}-3"
        rows.append({"question": question, "answer": "2"})
    write_rows(tmp_path / "sums.jsonl", rows)
    (tmp_path / "prompt.txt").write_text("1+1\n1+1=2 #### 2\n{question}\n")
    words = """
        --data sums.jsonl --prompt prompt.txt --max-step-tokens 8 --max-depth 4 --simulations 40
        --search-rows 4 --cache-tokens 12000
    """.split()
    return tmp_path, ["--model", model_folder, *words]


def write_rows(file: Path, rows: list[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(*words, cwd):
    """A command in a process group of its own; it hears SIGINT also where the tests run in the
    background of a shell, which does not."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process) -> str:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out


def whole_lines(folder) -> list:
    files = folder.glob("trees*.jsonl")
    return [line for file in files for line in file.read_bytes().split(b"\n")[:-1]]


def test_an_interrupted_search_ends_with_one_tree_a_question(work):
    """Catches trees that are lost, torn or doubled when search is killed, and shares that overlap
    when the rank count changes."""
    folder, words = work
    search = [ROOT / "mcts.py", *words, "--out"]
    for stop, launch in ((signal.SIGKILL, []), (signal.SIGINT, []), (signal.SIGTERM, TORCHRUN)):
        before = len(whole_lines(folder))
        process = start(*launch, *search, "trees.jsonl", cwd=folder)
        while len(whole_lines(folder)) < before + 3 and process.poll() is None:
            time.sleep(0.01)
        # torchrun hands SIGTERM on to its ranks; a SIGKILL they would outlive
        process.send_signal(stop)
        process.communicate(timeout=60)
        if stop == signal.SIGINT:
            assert process.returncode == 130
    count = len(whole_lines(folder))
    assert 9 <= count < QUESTIONS, "the search ended before it was killed: make it longer"
    with open(folder / "trees.jsonl", "a") as file:
        file.write('{"id": "torn')
    printed = finish(start(*TORCHRUN, *search, "trees.jsonl", cwd=folder))
    assert "torn" in printed
    trees = [tree for file in folder.glob("trees*.jsonl") for tree in read_trees(file)]
    assert len(trees) == len({tree.id for tree in trees}) == QUESTIONS
    finish(start(*search, "once.jsonl", cwd=folder))
    once = {tree.id: tree for tree in read_trees(folder / "once.jsonl")}
    same = 0  # the samples are those of an uninterrupted search, but for rounding
    for tree in trees:
        wanted = [node.tokens for node in once[tree.id].nodes]
        same += [node.tokens for node in tree.nodes] == wanted
    assert same >= QUESTIONS - 3


def test_every_strategy_answers(work):
    """Catches strategies that only run alone, a table without costs, a diagnosis without trees or a
    reference, and an audit that shows no answer."""
    folder, words = work
    strategies = ["greedy", "sampled", "majority:3", "best:3", "weighted:3"]
    strategies += ["beam:2,2", "vote:2,2", "mcts:3"]
    finish(start(ROOT / "mcts.py", *words, "--limit", "8", "--out", "trees.jsonl", cwd=folder))
    answer = [ROOT / "eval.py", *words, "--limit", "6", "--strategy", *strategies]
    more = "--trees trees.jsonl --json out.json --audit 1".split()
    printed = finish(start(*answer, *more, cwd=folder))
    found = json.loads((folder / "out.json").read_text())
    assert [row["strategy"] for row in found["answers"]] == strategies
    assert all(name in printed for name in strategies)
    cost = {row["strategy"]: row["sampled_tokens"] for row in found["answers"]}
    assert cost["majority:3"] > cost["greedy"] > 0
    assert "AUC" in printed and found["diagnosis"]["calibration"]
    assert printed.count("graded by") == printed.count("\n--- ") == len(strategies)
    more = "--limit 2 --budget --json curve.json --max-step-tokens 4".split()
    finish(start(ROOT / "eval.py", *words, *more, cwd=folder))
    assert len(json.loads((folder / "curve.json").read_text())["answers"]) > 20
    assert (folder / "curve.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_ranks_share_the_questions_to_answer(work):
    """Catches ranks that each answer all questions, and a file that is written by several."""
    folder, words = work
    command = [*TORCHRUN, ROOT / "eval.py", *words, "--limit", "6", "--strategy", "greedy"]
    printed = finish(start(*command, "--json", "out.json", cwd=folder))
    alone = [ROOT / "eval.py", *command[len(TORCHRUN) + 1 :], "--json", "alone.json"]
    finish(start(*alone, cwd=folder))
    found, wanted = (json.loads((folder / f"{name}.json").read_text()) for name in ("out", "alone"))
    assert printed.count("on 6 questions") == 1
    for name in ("questions", "accuracy", "steps", "sampled_tokens", "answers"):
        assert found["answers"][0][name] == wanted["answers"][0][name], name


def test_tree_files_of_other_searches_are_left_alone(work):
    """Catches a file that only looks like another rank's, names with signs of a pattern, and trees
    of another tokenizer."""
    folder, words = work
    for name in ("trees-1.jsonl", "trees.jsonl", "t[1].jsonl", "t[1].jsonl"):
        finish(start(ROOT / "mcts.py", *words, "--limit", "2", "--out", name, cwd=folder))
        assert len(read_trees(folder / name)) == 2
    text = (folder / "trees.jsonl").read_text()
    text = text.replace('"tokens": [', '"tokens": [99999, ')
    text = text.replace('"sampled": [', '"sampled": [false, ')
    (folder / "other.jsonl").write_text(text)
    process = start(ROOT / "eval.py", *words, "--limit", "2", "--trees", "other.jsonl", cwd=folder)
    assert process.communicate(timeout=60)[1].count("\n") == 1 and process.returncode == 2


def test_benchmark_in_tiny_mode(work):
    """Catches a benchmark whose two sides do not do the same work."""
    folder, words = work
    words += "--simulations 4 --expand-width 4 --questions 3 --live 2".split()
    words += "--alternations 1 --sample-tokens 4".split()
    bench = [ROOT / "experiments" / "bench.py", "search", *words]
    fed = {}
    for side in ("ours", "peer", "no tree cache", "sample-ours", "sample-peer"):
        printed = finish(start(*bench, "--side", side, cwd=folder))
        found = json.loads(printed.splitlines()[-1])
        fed[side] = found["fed_tokens"]
        if not side.startswith("sample"):
            assert 3 <= found["simulations"] <= 12 and found["nodes"] == 4 * found["simulations"]
        else:
            assert found["sampled_tokens"] == 32 * 4
    assert fed["no tree cache"] > fed["ours"]
    if not importlib.util.find_spec("vllm"):
        process = start(*bench, "--side", "vllm", cwd=folder)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 2 and "requirements-vllm.txt" in errors.splitlines()[-1]
    speed = ROOT / "experiments" / "search_speed.py"
    assert "matrix products" in finish(start(speed, "profile", *words, cwd=folder))
    assert "two ranks" in finish(start(speed, "ranks", *words, cwd=folder))


def test_trees_of_a_few_shot_prompt_are_trained_under_another(work):
    """Catches a reference pass, losses or answers under the prompt of the search where --train-
    prompt names another."""
    folder, words = work
    (folder / "plain.txt").write_text("{question}\n")
    rows = (folder / "sums.jsonl").read_text().splitlines(keepends=True)[:20]
    (folder / "few.jsonl").write_text("".join(rows))
    more = "--data few.jsonl --train-prompt plain.txt --tune-epochs 1 --out run".split()
    finish(start(ROOT / "train.py", *words, *more, cwd=folder))
    trees = read_trees(folder / "run" / "round1" / "trees-0.jsonl")
    tokenizer = StepTokenizer.load(folder / "model")
    for tree in trees:  # the search saw the examples
        assert tokenizer.tokenizer.decode(tree.nodes[0].tokens).startswith("1+1")
    with safe_open(folder / "run" / "round1" / "reference.safetensors", "pt") as file:
        stored = file.get_tensor("logp")
    found = {tree.id: tree for tree in trees}
    questions = load_questions(str(folder / "few.jsonl"))[:16]  # the last fifth is held out
    asked = [tokenizer.set_prompt(found[question.id], question) for question in questions]
    plain = rescore(load_model(folder / "model"), asked)
    wanted = []
    for tree in plain:
        lesson = learn(tree, LossConfig())
        read = compared(lesson)  # by the preference loss
        wanted += [lesson.tree.nodes[index].logp for index in read] if len(read) > 1 else []
    wanted = torch.tensor(wanted)
    assert 4 < len(wanted) < sum(len(tree.nodes) for tree in plain)
    torch.testing.assert_close(stored, wanted, atol=1e-3, rtol=1e-4)


def test_training_on_trees_that_were_searched_before(work):
    """Catches trees of --trees that are searched again, mixed up or taken for other questions."""
    folder, words = work
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    write_rows(folder / "few.jsonl", [{**row, "id": str(n)} for n, row in enumerate(rows[:20])])
    words += "--data few.jsonl --simulations 4".split()
    search = [ROOT / "mcts.py", *words, "--limit", "12", "--seed", "5", "--out", "given.jsonl"]
    finish(start(*search, cwd=folder))
    given = {tree.id: tree for tree in read_trees(folder / "given.jsonl")}
    train = [ROOT / "train.py", *words, "--tune-epochs", "1", "--trees", "given.jsonl"]
    finish(start(*train, "--out", "run", cwd=folder))
    found = {tree.id: tree for tree in read_trees(folder / "run" / "round1" / "trees-0.jsonl")}
    assert len(given) == 12 and len(found) == 16  # four are searched, the last fifth is held out
    assert all(found[identity] == tree for identity, tree in given.items())
    write_rows(folder / "few.jsonl", [{**row, "id": str(n)} for n, row in enumerate(rows[1:21])])
    for file in ("given.jsonl", "missing.jsonl"):
        process = start(*train, "--out", "other", "--trees", file, cwd=folder)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2 and f"--trees {file}" in errors.splitlines()[-1]


def refused(*words, cwd) -> str:
    """What a command that ends with status 2 says."""
    process = start(*words, cwd=cwd)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    return errors


def test_what_a_search_was_made_with_may_not_change(work):
    """Catches other questions, prompts or weights that are taken for the old ones because their
    names are the same."""
    folder, words = work
    search = [ROOT / "mcts.py", *words, "--limit", "3", "--out", "trees.jsonl"]
    finish(start(*search, cwd=folder))
    assert "0 trees" in finish(start(*search, cwd=folder))
    questions, prompt = folder / "sums.jsonl", folder / "prompt.txt"
    weights = folder / "model" / "model.safetensors"
    for file, change, message in (
        (
            questions,
            lambda content: content.replace(b'"2"', b'"3"'),
            "of another question or answer",
        ),
        (
            questions,
            lambda content: content.replace(b"0+0", b"1+1"),
            "of another question or answer",
        ),
        (prompt, lambda content: content.replace(b"1+1=2", b"1+1=0"), "other prompts"),
        (weights, lambda content: content[:-1] + bytes([content[-1] ^ 1]), "other weights"),
    ):
        before = file.read_bytes()
        file.write_bytes(change(before))
        assert file.read_bytes() != before
        assert message in refused(*search, cwd=folder)
        file.write_bytes(before)
    assert "0 trees" in finish(start(*search, cwd=folder))


def test_what_a_run_learns_from_may_not_change(work):
    """Catches worked solutions or ids that are others when a run is resumed."""
    folder, words = work
    rows = [
        {"question": f"{n}+1*2", "answer": "0", "solution": "0 #### 0", "id": n} for n in range(6)
    ]
    write_rows(folder / "few.jsonl", rows)
    more = (
        "--data few.jsonl --test-data sums.jsonl --test-limit 1 --sft-steps 1 --rounds 0 --out run"
    )
    train = [ROOT / "train.py", *words, *more.split()]
    finish(start(*train, cwd=folder))
    for change in ({"solution": "0+0=0 #### 0"}, {"id": "other"}):
        write_rows(folder / "few.jsonl", [rows[0] | change, *rows[1:]])
        assert "other questions" in refused(*train, cwd=folder)
    write_rows(folder / "few.jsonl", rows)
    config = json.loads((folder / "run" / "config.json").read_text())
    # as an older version wrote it
    del config["identity"], config["SearchConfig"]["in_flight"], config["blake2b"]
    (folder / "run" / "config.json").write_text(json.dumps(config))
    finish(start(*train, cwd=folder))
