"""The comparison with TRL in small: the same pairs must give the same loss."""
import json

import pytest

from conftest import ROOT
from data import write_trees
from test_mcts import QUESTIONS
from test_svpo import searched
from test_train import command


def test_the_loss_is_that_of_trl(tmp_path, model_folder, model, tokenizer):
    """Catches a preference loss that is not DPO's sigmoid loss as TRL computes it, pair by pair, on prefix and step: 1e-4."""
    pytest.importorskip("trl")
    (model_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}')
    write_trees(tmp_path / "trees.jsonl", searched(model, tokenizer))
    (tmp_path / "questions.jsonl").write_text("".join(
        json.dumps({"id": question.id, "question": question.text, "answer": question.answer}) + "\n" for question in QUESTIONS))
    words = [ROOT / "bench.py", "train", "--model", model_folder, "--data", "questions.jsonl", "--trees", "trees.jsonl", "--batch", "3"]
    rows = []
    for side in ("train-ours", "trl", "trl-precomputed"):
        done = command(*words, "--side", side, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    assert rows[0]["pairs"] == rows[1]["pairs"] == rows[2]["pairs"] > 5
    assert abs(rows[0]["loss"] - 0.6931) > 1e-3  # the policy is not its reference
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4) and rows[2]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-4)
