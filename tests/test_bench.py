"""The comparison with TRL in small, and the flags that each measurement is started with."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from test_mcts import QUESTIONS
from test_svpo import searched
from test_train import command

from data import RECIPES, SourceConfig, write_trees
from experiments.bench import flags
from experiments.sides import BenchConfig
from mcts import SearchConfig
from support.flags import parse_args

CONFIGS = (SourceConfig, BenchConfig, SearchConfig)


@pytest.mark.parametrize("data", ["arithmetic", "one.jsonl two.jsonl"])
def test_a_measurement_gets_the_flags_of_its_command(data):
    """Catches a process of its own that refuses what it is started with, or measures with other
    flags: empty ones, switches that are off, several files, and defaults of the built-in task."""
    words = "--model m --prompt few.txt --no-leaf-value --live 3 --dtype bfloat16 --data".split()
    stages = parse_args("", CONFIGS, [*words, *data.split()], recipes=RECIPES)
    source, config, search = stages
    assert parse_args("", CONFIGS, flags(*stages), recipes=RECIPES) == stages
    changed = flags(*stages, prompt="", live=5, simulations=99)
    assert parse_args("", CONFIGS, changed, recipes=RECIPES) == (
        replace(source, prompt=""),
        replace(config, live=5),
        replace(search, simulations=99),
    )


def test_the_loss_is_that_of_trl(tmp_path, model_folder, model, tokenizer):
    """Catches a preference loss that is not DPO's sigmoid loss as TRL computes it, pair by pair, on
    prefix and step: 1e-4."""
    pytest.importorskip("trl")
    names = {"eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_trees(tmp_path / "trees.jsonl", searched(model, tokenizer))
    with open(tmp_path / "questions.jsonl", "w") as file:
        for question in QUESTIONS:
            row = {"id": question.id, "question": question.text, "answer": question.answer}
            file.write(json.dumps(row) + "\n")
    words = "--data questions.jsonl --trees trees.jsonl --batch 3".split()
    bench = [ROOT / "experiments" / "bench.py", "train", "--model", model_folder, *words]
    rows = []
    for side in ("train-ours", "trl", "trl-precomputed"):
        done = command(*bench, "--side", side, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    ours, trl, precomputed = rows
    assert ours["pairs"] == trl["pairs"] == precomputed["pairs"] > 5
    assert abs(ours["loss"] - 0.6931) > 1e-3  # the policy is not its reference
    assert ours["loss"] == pytest.approx(trl["loss"], abs=1e-4)
    assert ours["loss"] == pytest.approx(precomputed["loss"], abs=1e-4)
