"""The commands, from the outside: a small whole run, resuming, and what bad input gets."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_mcts import CONFIG, QUESTIONS

import eval
import mcts
import train
from data import RECIPES, load_questions, load_splits, read_trees
from eval import AnswerConfig
from mcts import SearchConfig, search_trees
from model import load_model
from support.flags import parse_args, run_command
from svpo import LossConfig, learn, rescore
from tasks.built_in import split_of
from train import RunConfig, TrainConfig, backward, make_job, order, schedule, shard

SMALL = """
    --sft-questions 200 --search-questions 12 --valid-questions 6 --test-limit 10 --rounds 2
    --sft-steps 40 --sft-batch 16 --simulations 4 --tune-batch 4
""".split()


def command(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run of `python train.py`: (its working folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    done = command(ROOT / "train.py", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_the_promised_folder(run):
    """Catches stages that are not saved, a log without every step, and a table without a row or
    column."""
    folder, printed = run
    base = folder / "runs" / "arithmetic-seed0"
    wanted = "config.json model.safetensors value_head.safetensors tokenizer.json eval.json"
    for stage in ("sft", "round1", "round2"):
        names = {path.name for path in (base / stage).iterdir()}
        assert set(wanted.split()) <= names
        load_model(base / stage)
    assert len(read_trees(base / "round1" / "trees-0.jsonl")) == 12
    lines = [json.loads(line) for line in open(base / "log.jsonl")]
    stages = [line["stage"] for line in lines]
    assert [stages.count(stage) for stage in ("sft", "round1", "round2")] == [40, 6, 6]
    figures = "loss policy mse margin sft win_reward grad_norm unique_tokens_s"
    assert set(figures.split()) <= set().union(*lines)
    table = printed.split("unseen questions")[-1]
    columns = ["greedy", "sampled", "SBS(1,5)", "SBS(3,5)", "siblings own", "siblings fixed"]
    for word in (*columns, "sft", "round1", "round2"):
        assert word in table


def test_what_changes_rounding_may_change_on_a_run(run):
    """Catches a finished run that is refused because it is looked at on another machine, and a
    change that is not said."""
    folder, _ = run
    done = command(ROOT / "train.py", *SMALL, "--dtype", "bfloat16", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "from here on with --dtype 'float32' -> 'bfloat16'\n" in done.stdout


@pytest.mark.parametrize("units", ["", "_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_the_type_follows_the_units_of_the_machine(monkeypatch, units):
    """Catches bfloat16 on a CPU that multiplies in it slowly, float32 on one that does not, and
    another type for the tiny model."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == units)

    def dtype(*words):
        return parse_args("", (RunConfig,), [*words, "--device", "cpu"], recipes=RECIPES)[0].dtype

    real = ("--model", "folder", "--data", "gsm8k")
    assert dtype(*real) == dtype(*real, "--dtype", "auto") == ("bfloat16" if units else "float32")
    assert dtype(*real, "--dtype", "float32") == dtype() == "float32"
    assert dtype(*real, "--plan") == "bfloat16"  # the plan is one for GPUs


def test_a_copy_computes_in_bfloat16(model, tokenizer):
    """Catches gradients that stay with the copy or lose those of an earlier pack, weights that the
    copy does not take over, and float32 training through a copy."""
    losses = LossConfig(pairs="all", min_gap=0.1)
    trees = search_trees(model, tokenizer, QUESTIONS, CONFIG)
    lessons = list(enumerate(learn(tree, losses) for tree in trees))
    several = TrainConfig(pack_tokens=lessons[0][1].tree.tokens())
    assert shard(model, "float32") is model
    backward(model, lessons, losses, several, 0, 0)
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    computing = shard(model, "bfloat16")
    backward(computing, lessons, losses, several, 0, 0)
    errors = []
    for parameter, gradient in zip(model.parameters(), wanted):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        errors.append((parameter.grad - gradient).norm())
        assert errors[-1] <= 0.1 * gradient.norm()
    assert sum(error > 0 for error in errors) > len(errors) / 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    backward(computing, lessons, losses, several, 0, 0)
    for mine, master in zip(computing.parameters(), model.parameters()):
        assert mine.grad is None and torch.equal(mine, master.bfloat16())


@pytest.mark.parametrize("objective", ["dpo", "rft"])
def test_what_is_printed_is_of_the_objective(tmp_path, objective):
    """Catches figures about step pairs where the objective compares whole solutions, or nothing."""
    words = ["--objective", objective, "--rounds", "1", "--search-questions", "40", "--out", "out"]
    done = command(ROOT / "train.py", *SMALL, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("40 trees: "))
    assert (" pairs and " in line) == (objective == "dpo")
    assert ("+ last step" in done.stdout) == (objective == "dpo")
    assert "+ sibling" not in done.stdout
    if objective == "dpo":  # one pair a tree at most
        assert float(re.search(r"([\d.]+) pairs", line)[1]) <= 1


def test_the_run_is_drawn(run):
    """Catches figures that only a finished run of all stages has, and a curve of equal budget that
    is left out."""
    pytest.importorskip("matplotlib")
    folder, _ = run
    base = folder / "runs" / "arithmetic-seed0"
    row = json.loads((base / "round1" / "eval.json").read_text())
    for curve in ({}, {"answers": row["answers"]}):
        if curve:
            (base / "curve.json").write_text(json.dumps(curve))
        done = command(ROOT / "eval.py", "--figures", "runs/arithmetic-seed0", cwd=folder)
        assert done.returncode == 0 and "figures.png" in done.stdout, done.stderr
        assert (base / "figures.png").stat().st_size > 20_000
        (base / "figures.png").unlink()
    (base / "curve.json").unlink()


def test_no_test_question_is_searched_or_trained_on(run):
    """Catches leaks between the splits, read off what a run really wrote."""
    folder, _ = run
    base = folder / "runs" / "arithmetic-seed0"
    files = [base / f"round{number}" / "trees-0.jsonl" for number in (1, 2)]
    searched = [tree.question for file in files for tree in read_trees(file)]
    assert len(searched) == 24 and {split_of(text) for text in searched} == {"search"}
    answered = json.loads((base / "round2" / "eval.json").read_text())["answers"][0]["answers"]
    tested = {question.id: question.text for question in load_questions("arithmetic:test", 10)}
    assert {row["id"] for row in answered} == set(tested)
    assert {split_of(text) for text in tested.values()} == {"test"}


def test_the_same_command_resumes(run):
    """Catches a second run that starts over, and one that mixes two configurations."""
    folder, _ = run
    base = folder / "runs" / "arithmetic-seed0"
    before = load_model(base / "round2").state_dict()
    for name in ("config.json", "eval.json", "model.safetensors"):
        (base / "round2" / name).unlink()
    trees = (base / "round2" / "trees-0.jsonl").read_text()
    (base / "round2" / "trees-0.jsonl").write_text(trees + trees[:40])
    log = (base / "log.jsonl").read_text()
    again = command(ROOT / "train.py", *SMALL, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert (base / "round2" / "trees-0.jsonl").read_text() == trees and "torn" in again.stdout
    assert without_speeds((base / "log.jsonl").read_text()) == without_speeds(log)
    after = load_model(base / "round2").state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    others = "--seed 1 --beta 0.7 --out runs/arithmetic-seed0".split()
    other = command(ROOT / "train.py", *SMALL, *others, cwd=folder)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "--seed" in other.stderr and "--beta" in other.stderr


def without_speeds(log: str) -> list[dict]:
    """The lines of a log.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in log.splitlines()]
    timed = ("_s", "blake2b")
    return [{name: row[name] for name in row if not name.endswith(timed)} for row in rows]


def test_search_and_answering_alone(run):
    """Catches commands that need the training loop, and trees that are searched twice."""
    folder, _ = run
    model = "--model runs/arithmetic-seed0/round2 --max-step-tokens 16".split()
    for total in (5, 8):
        words = f"--data arithmetic:search --out trees.jsonl --limit {total}".split()
        done = command(ROOT / "mcts.py", *model, *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        ids = [tree.id for tree in read_trees(folder / "trees.jsonl")]
        assert len(set(ids)) == len(ids) == total
    words = "--data arithmetic --limit 8 --trees trees.jsonl --strategy greedy beam:2,2".split()
    done = command(ROOT / "eval.py", *model, *words, "--json", "out.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    row = json.loads((folder / "out.json").read_text())
    assert [answer["questions"] for answer in row["answers"]] == [8, 8] and "siblings" in row
    assert "beam:2,2" in done.stdout and "AUC" in done.stdout


def test_real_questions_through_a_checkpoint(tmp_path, model_folder):
    """Catches a path that only the built-in task can take: JSONL, a prompt file, held-out
    questions, no SFT."""
    from transformers import AutoModelForCausalLM

    rows = []
    for a in range(4):
        rows += [{"question": f"{a}+{b}", "answer": str((a + b) % 7)} for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompt.txt").write_text("1+1\n1+1=2 #### 2\n{question}\n")
    words = """
        --data sums.jsonl --prompt prompt.txt --limit 10 --simulations 3 --max-step-tokens 8
        --max-depth 3 --cache-tokens 8000 --rounds 1 --out out
    """.split()
    done = command(ROOT / "train.py", "--model", model_folder, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the last fifth of each file of sums.jsonl, 2 questions" in done.stdout
    trees = read_trees(tmp_path / "out" / "round1" / "trees-0.jsonl")
    assert len(trees) == 8 and trees[0].nodes[0].tokens[:3] == [9, 2, 9]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "round1")


def test_questions_must_fit_under_both_prompts(tmp_path, model_folder, capsys):
    """Catches a question that fits under --prompt alone, so that the search of the trained model
    ends hours later."""
    rows = [{"question": text, "answer": "2"} for text in ("1+1", "1+" * 60 + "1")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+2", "answer": "3"}))
    (tmp_path / "long.txt").write_text("1+" * 70 + "{question}\n")
    words = ["--model", str(model_folder), "--data", str(tmp_path / "train.jsonl")]
    words += ["--test-data", str(tmp_path / "test.jsonl"), "--max-step-tokens", "8"]
    kinds = (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig)
    for more, left in (([], 2), (["--train-prompt", str(tmp_path / "long.txt")], 1)):
        configs = parse_args("", kinds, [*words, *more, "--device", "cpu"], recipes=RECIPES)
        splits = load_splits(configs[0])
        make_job(configs, "cpu", splits)
        assert [len(part) for part in splits["search"]] == [left] * 3
    assert "1 questions have prompts of more than 248 tokens" in capsys.readouterr().out


TOO_LONG = "1+" * 400 + "1"  # a question that no context has room for


def bad_inputs(folder: Path, model: Path):
    """(words after train.py, what the one line must name)."""
    row = '{"question": "1+1", "answer": "2"}\n'
    (folder / "good.jsonl").write_text(row + '{"question": "1+2", "answer": "3"}\n')
    (folder / "torn.jsonl").write_text(row + '{"question": "1+')
    long = json.dumps({"question": TOO_LONG, "answer": "2"})
    (folder / "long.jsonl").write_text(row + long + "\n")
    (folder / "problems.jsonl").write_text('{"problem": {"text": "1+1"}, "answer": "2"}\n')
    (folder / "no_slot.txt").write_text("no place for the question")
    data = ["--data", "good.jsonl"]
    yield ["--model", "absent", *data], "absent"
    yield ["--model", model, "--data", "torn.jsonl"], "torn.jsonl, line 2"
    yield ["--model", model, "--data", "absent.jsonl"], "absent.jsonl"
    short = ["--max-step-tokens", "8"]
    yield ["--model", model, "--data", "long.jsonl", *short], "long-2"
    yield ["--model", model, *data], "--max-step-tokens"
    yield ["--model", model, "--data", "problems.jsonl"], "problems.jsonl, line 1: 'problem' must"
    yield ["--model", model, "--data", "gsm8k:problems.jsonl"], "read as a row of gsm8k"
    yield ["--model", model, "--data", "math:absent.jsonl"], "there is no file 'absent.jsonl'"
    yield ["--model", model, "--data", "math", "--data-dir", "."], "math/train.jsonl does not exist"
    yield ["--model", model, *data, "--prompt", "no_slot.txt"], "{question}"
    yield ["--model", model, *data, "--prompt", "absent.txt"], "absent.txt"
    yield ["--model", model, "--data-dir", "."], "gsm8k/train.jsonl does not exist"
    yield ["--model", model, "--data", "deduction"], "--model tiny"
    yield ["--model", model, *data, *short, "--sft-steps", "5"], "worked solutions"
    yield ["--model", model, *data, "--test-data", "absent.jsonl"], "absent.jsonl"
    yield ["--sft-questions", "99999"], "13189"
    yield ["--expand-width", "0"], "--expand-width"
    yield ["--beta", "nan"], "--beta"
    yield ["--limit", "-1"], "--limit"
    yield ["--pairs", "some"], "--pairs"
    yield ["--device", "abacus"], "--device"
    yield ["--sft-step", "5"], "--sft-step"
    yield ["--no-such-flag", "1"], "--no-such-flag"
    yield ["--simulations", "many"], "--simulations"


def refused(main, words, capsys, monkeypatch) -> str:
    """Run a command in this process; it must end with status 2 and one line on stderr, which is
    returned."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    printed = capsys.readouterr().err
    assert end.value.code == 2, words
    assert len(printed.splitlines()) == 1 and printed.startswith("error: "), (words, printed)
    return printed


def test_bad_input_is_one_line_and_status_2(tmp_path, model_folder, capsys, monkeypatch):
    """Catches tracebacks, exit status 0 or 1, and run folders left half-written."""
    monkeypatch.chdir(tmp_path)
    for words, name in bad_inputs(tmp_path, model_folder):
        assert name in refused(train.main, [*words, "--out", "out"], capsys, monkeypatch), words
        assert not (tmp_path / "out").exists(), words
    done = command(ROOT / "train.py", "--no-such-flag", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --no-such-flag 1\n"


def test_bad_input_to_search_and_answering(tmp_path, model_folder, capsys, monkeypatch):
    """Catches tracebacks and spent hours before an unusable flag, file or folder is noticed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": TOO_LONG, "answer": "2"}) + "\n")
    (tmp_path / "bad_trees.jsonl").write_text('{"id": 1}\n')
    common = ["--model", model_folder, "--data", "good.jsonl", "--max-step-tokens", "8"]
    long = ["--model", model_folder, "--data", "long.jsonl", "--max-step-tokens", "8"]
    for main, words, name in (
        (mcts.main, common, "--out"),
        (mcts.main, [*common, "--out", "no/trees.jsonl"], "no/trees.jsonl"),
        (mcts.main, [*common, "--out", "bad_trees.jsonl"], "bad_trees.jsonl, line 1"),
        (mcts.main, [*common, "--out", "trees.jsonl", "--cache-tokens", "100"], "--cache-tokens"),
        (mcts.main, [*long, "--out", "trees.jsonl"], "long-1"),
        (eval.main, [*common, "--strategy", "beam:0,5"], "beam:0,5"),
        (eval.main, [*common, "--json", "no/out.json"], "no/out.json"),
        (eval.main, [*common, "--trees", "bad_trees.jsonl"], "bad_trees.jsonl, line 1"),
        (eval.main, ["--model", model_folder, "--data", "arithmetic:exam"], "arithmetic:exam"),
        (eval.main, long, "long-1"),
    ):
        assert name in refused(main, words, capsys, monkeypatch), words
        assert not (tmp_path / "trees.jsonl").exists()


def test_one_tree_file_holds_one_search(tmp_path, model_folder):
    """Catches trees of two models or settings in one file."""
    (tmp_path / "good.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    words = "--data good.jsonl --out trees.jsonl --cache-tokens 8000 --simulations 2".split()
    words = [ROOT / "mcts.py", "--model", model_folder, *words, "--max-step-tokens", "8"]
    assert command(*words, cwd=tmp_path).returncode == 0
    other = command(*words, "--c-puct", "2", cwd=tmp_path)
    assert other.returncode == 2 and "--c-puct 1.25 -> 2.0" in other.stderr


def test_a_loss_that_diverges_ends_the_run(tmp_path):
    """Catches training that goes on with NaN, and weights written from it."""
    words = "--sft-lr 1e30 --rounds 0 --out out".split()
    done = command(ROOT / "train.py", *SMALL, *words, cwd=tmp_path)
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert message.startswith("error: sft, step") and "gradient norm" in message
    assert not (tmp_path / "out" / "sft" / "config.json").exists()


def test_data_order():
    """Catches items left out or doubled within a pass, passes in the same order, and an order that
    depends on where it starts."""
    row = [index for step in range(7) for index in order(10, 3, 5 * step, 5)]
    assert all(sorted(row[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert row[:10] != row[10:20] and order(10, 4, 0, 10) != row[:10]
    assert order(10, 3, 8, 9) == row[8:17]
    assert len(order(3, 0, 0, 8)) == 8  # a step larger than the data


def test_learning_rate_schedule():
    """Catches a first step at rate 0, a peak that is not reached, and a rate that does not come
    down."""
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1 and rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule(0, 1, 0.03) == 1


def test_rescore_replaces_scores_only(model, tokenizer):
    """Catches values booked on other nodes, and pairs that change with the model that judges
    them."""
    trees = list(search_trees(model, tokenizer, QUESTIONS, CONFIG))
    blank = []
    for tree in trees:
        nodes = [replace(node, value=9.0, logp=9.0) for node in tree.nodes]
        blank.append(replace(tree, nodes=nodes))
    for tree, again in zip(trees, rescore(model, blank)):
        for name in ("value", "logp"):
            wanted = [getattr(node, name) for node in tree.nodes]
            assert [getattr(node, name) for node in again.nodes] == pytest.approx(wanted, abs=1e-3)
        assert [node.q_value for node in again.nodes] == [node.q_value for node in tree.nodes]


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: edit(folder, vocab_size=5), "vocabulary has 5"),
        (lambda folder: edit(folder, hidden_act="relu"), "hidden_act"),
        (lambda folder: edit(folder, num_hidden_layers=9), "missing tensor"),
    ],
)
def test_bad_models_are_one_line_and_status_2(
    tmp_path, model_folder, damage, name, capsys, monkeypatch
):
    """Catches checkpoints that load in part, and tokenizers of another model."""
    damage(model_folder)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"}]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", model_folder, "--data", "good.jsonl", "--out", "out"]
    assert name in refused(train.main, words, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
