"""The worked examples of the README, run as they stand there."""
import json
import re

import pytest

from conftest import ROOT
from test_train import SMALL, command


def examples() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Fork it")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def example(name: str) -> str:
    code = next(code for code in examples() if f'["{name}"]' in code)
    return f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + code  # a file beside the modules needs no such line


def test_examples_are_short():
    """Catches an extension point that has grown: at most 15 lines each."""
    assert len(examples()) == 4
    for code in examples():
        assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_a_new_objective(tmp_path):
    """Catches a registry that the commands do not read: the run must log the new loss, not DPO's log 2."""
    (tmp_path / "ipo.py").write_text(example("ipo"))
    done = command("ipo.py", *SMALL, "--objective", "ipo", "--rounds", "1", "--min-gap", "0.1", "--search-questions", "30", "--tune-lr", "1e-9",
                   "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    found = [line["policy"] for line in lines if "policy" in line]
    assert found and found == pytest.approx([(1 / (2 * 0.3)) ** 2] * len(found), rel=1e-3)  # the policy is its reference


def test_a_new_search(tmp_path, model_folder):
    """Catches an answering table that new searches cannot enter, and one that runs another strategy in their place."""
    (tmp_path / "dfs.py").write_text(example("dfs"))
    words = ["dfs.py", "--model", model_folder, "--data", "arithmetic", "--limit", "5", "--max-step-tokens", "8", "--json", "out.json"]
    done = command(*words, "--strategy", "dfs:4", "greedy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert [row["strategy"] for row in answers] == ["dfs:4", "greedy"] and answers[0]["steps"] >= 4
    assert command(*words, "--strategy", "bfs:4", cwd=tmp_path).returncode == 2


def test_a_new_task(tmp_path):
    """Catches a task that only the built-in ones can be: its questions, splits and tokens must reach training, search and answers."""
    (tmp_path / "sorting.py").write_text(example("sorting"))
    done = command("sorting.py", "--data", "sorting", *SMALL, "--rounds", "1", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trees = [json.loads(line) for line in open(tmp_path / "out" / "round1" / "trees-0.jsonl")]
    assert len(trees) == 12 and all(tree["answer"] == "".join(sorted(tree["question"])) and len(tree["question"]) == 4 for tree in trees)


def test_a_new_model_family(tmp_path):
    """Catches a family's checkpoint that loads and computes something else: its logits must be those of transformers."""
    (tmp_path / "olmo.py").write_text(example("olmo"))
    (tmp_path / "check.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, transformers, train
import olmo, model
torch.manual_seed(0)
twin = transformers.OlmoForCausalLM(transformers.OlmoConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                           max_position_embeddings=64, pad_token_id=1, eos_token_id=2)).eval()
twin.save_pretrained("twin")
ours = model.load_model("twin")
token_BT = torch.randint(0, 40, (3, 17))
with torch.inference_mode():
    torch.testing.assert_close(ours(token_BT)[0], twin(token_BT).logits, atol=1e-5, rtol=1e-5)
ours.model.norm.forward = lambda x: x
with torch.inference_mode():
    assert (ours(token_BT)[0] - twin(token_BT).logits).abs().max() > 1e-3
print("equal")
""")
    done = command("check.py", cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr
