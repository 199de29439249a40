"""The commands, from the outside: a small whole run, resuming, and what bad input gets."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from data import read_trees, split_of
from model import load_model

SMALL = ["--sft-questions", "200", "--search-questions", "12", "--valid-questions", "6", "--test-limit", "10", "--rounds", "2",
         "--sft-steps", "40", "--sft-batch", "16", "--simulations", "4", "--tune-batch", "4"]


def command(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment, timeout=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run of `python train.py`: (its working folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    done = command(ROOT / "train.py", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_the_promised_folder(run):
    """Catches stages that are not saved, a log without every step, and a table without a row or column."""
    folder, printed = run
    base = folder / "runs" / "arithmetic-seed0"
    for stage in ("sft", "round1", "round2"):
        names = {path.name for path in (base / stage).iterdir()}
        assert {"config.json", "model.safetensors", "value_head.safetensors", "tokenizer.json", "eval.json"} <= names
        load_model(base / stage)
    assert len(read_trees(base / "round1" / "trees-0.jsonl")) == 12
    lines = [json.loads(line) for line in open(base / "log.jsonl")]
    assert [sum(line["stage"] == stage for line in lines) for stage in ("sft", "round1", "round2")] == [40, 6, 6]
    assert {"loss", "policy", "mse", "margin", "sft", "win_reward", "grad_norm"} <= lines[-1].keys()
    table = printed.split("unseen questions")[-1]
    assert all(word in table for word in ("greedy", "sampled", "SBS(1,5)", "SBS(3,5)", "siblings own", "siblings fixed", "sft", "round1", "round2"))


def test_no_test_question_is_searched_or_trained_on(run):
    """Catches leaks between the splits, read off what a run really wrote."""
    folder, _ = run
    base = folder / "runs" / "arithmetic-seed0"
    searched = [tree.question for number in (1, 2) for tree in read_trees(base / f"round{number}" / "trees-0.jsonl")]
    assert len(searched) == 24 and {split_of(text) for text in searched} == {"search"}
    answered = json.loads((base / "round2" / "eval.json").read_text())["answers"][0]["answers"]
    from data import load_questions
    tested = {question.id: question.text for question in load_questions("arithmetic:test", 10)}
    assert {row["id"] for row in answered} == set(tested) and {split_of(text) for text in tested.values()} == {"test"}


def test_the_same_command_goes_on(run):
    """Catches a second run that starts over, and one that mixes two configurations."""
    folder, printed = run
    base = folder / "runs" / "arithmetic-seed0"
    before = load_model(base / "round2").state_dict()
    for name in ("config.json", "eval.json", "model.safetensors"):
        (base / "round2" / name).unlink()
    trees = (base / "round2" / "trees-0.jsonl").read_text()
    again = command(ROOT / "train.py", *SMALL, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert (base / "round2" / "trees-0.jsonl").read_text() == trees
    assert all(torch.equal(value, before[key]) for key, value in load_model(base / "round2").state_dict().items())
    other = command(ROOT / "train.py", *SMALL, "--seed", "1", "--beta", "0.7", "--out", "runs/arithmetic-seed0", cwd=folder)
    assert other.returncode == 2 and "--seed" in other.stderr and "--beta" in other.stderr and len(other.stderr.splitlines()) == 1


def test_search_and_answering_alone(run):
    """Catches commands that need the training loop, and trees that are searched twice."""
    folder, _ = run
    model = "runs/arithmetic-seed0/round2"
    for total in (5, 8):
        done = command(ROOT / "mcts.py", "--model", model, "--data", "arithmetic:search", "--out", "trees.jsonl", "--limit", total,
                       "--max-step-tokens", "16", "--row-slots", "512", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert len({tree.id for tree in read_trees(folder / "trees.jsonl")}) == len(read_trees(folder / "trees.jsonl")) == total
    done = command(ROOT / "eval.py", "--model", model, "--data", "arithmetic", "--limit", "8", "--sibling-limit", "4", "--strategy",
                   "greedy", "beam:2,2", "--json", "out.json", "--max-step-tokens", "16", cwd=folder)
    assert done.returncode == 0, done.stderr
    row = json.loads((folder / "out.json").read_text())
    assert [answer["questions"] for answer in row["answers"]] == [8, 8] and "siblings" in row and "SBS(2,2)" in done.stdout


def test_real_questions_through_a_checkpoint(tmp_path, model_folder):
    """Catches a path that only the built-in task can take: JSONL, a prompt file, held-out questions, no SFT."""
    rows = [{"question": f"{a}+{b}", "answer": str((a + b) % 7)} for a in range(4) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompt.txt").write_text("1+1\n1+1=2 #### 2\n{question}\n")
    words = [ROOT / "train.py", "--model", model_folder, "--data", "sums.jsonl", "--prompt", "prompt.txt", "--limit", "10",
             "--simulations", "3", "--max-step-tokens", "8", "--max-depth", "3", "--row-slots", "200", "--out", "out"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout and len(read_trees(tmp_path / "out" / "round1" / "trees-0.jsonl")) == 8
    assert read_trees(tmp_path / "out" / "round1" / "trees-0.jsonl")[0].nodes[0].tokens[:3] == [9, 2, 9]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "round1")


def bad_inputs(folder: Path, model: Path):
    """(words after train.py, what the one line must name)."""
    (folder / "good.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 1 + '{"question": "1+2", "answer": "3"}\n')
    (folder / "torn.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+')
    (folder / "long.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "' + "1+" * 400 + '1", "answer": "2"}\n')
    (folder / "no_slot.txt").write_text("no place for the question")
    data = ["--data", "good.jsonl"]
    yield ["--model", "absent", *data], "absent"
    yield ["--model", model, "--data", "torn.jsonl"], "torn.jsonl, line 2"
    yield ["--model", model, "--data", "absent.jsonl"], "absent.jsonl"
    yield ["--model", model, "--data", "long.jsonl"], "long-2"
    yield ["--model", model, *data, "--prompt", "no_slot.txt"], "{question}"
    yield ["--model", model, *data, "--prompt", "absent.txt"], "absent.txt"
    yield ["--model", model], "--model tiny"
    yield ["--no-such-flag", "1"], "--no-such-flag"
    yield ["--simulations", "many"], "--simulations"


def test_bad_input_is_one_line_and_status_2(tmp_path, model_folder):
    """Catches tracebacks, exit status 0 or 1, and run folders left half-written."""
    for words, name in bad_inputs(tmp_path, model_folder):
        done = command(ROOT / "train.py", *words, "--out", "out", cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert name in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, (words, done.stderr)
        assert not (tmp_path / "out").exists(), words


@pytest.mark.parametrize("damage, name", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "model.safetensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: edit(folder, vocab_size=5), "vocabulary has 5"),
    (lambda folder: edit(folder, hidden_act="relu"), "hidden_act"),
    (lambda folder: edit(folder, num_hidden_layers=9), "missing tensor")])
def test_bad_models_are_one_line_and_status_2(tmp_path, model_folder, damage, name):
    """Catches checkpoints that load in part, and tokenizers of another model."""
    damage(model_folder)
    (tmp_path / "good.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n')
    done = command(ROOT / "train.py", "--model", model_folder, "--data", "good.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and name in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
