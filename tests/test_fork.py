"""The worked examples of README.md and docs/forks.md, run as they stand there."""

import json
import re

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_train import SMALL, command

from data import read_trees

PATH = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"  # a file beside the modules needs no such


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def example(sign: str) -> str:
    """The code of the example that holds a sign."""
    found = [*examples("README.md"), *examples("docs/forks.md")]
    return next(code for code in found if sign in code)


def code_lines(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


def test_examples_are_short():
    """Catches an extension point that has grown: at most 22 lines each, a dataset and a reward 10,
    a value head 5 beside its class line."""
    assert len(examples("README.md")) == 3 and len(examples("docs/forks.md")) == 4
    for code in [*examples("README.md"), *examples("docs/forks.md")]:
        assert code_lines(code) <= 22
    assert code_lines(example('["puzzles"]')) <= 10 and code_lines(example("def score")) <= 10
    assert code_lines(example("class ValueHead")) <= 5


def test_a_value_head_of_two_layers(tmp_path):
    """Catches a head that is drawn, saved or loaded by the name of its one weight: a whole run with
    another one, whose files hold both layers, and which is loaded again for the second round."""
    head = "import torch\nimport torch.nn as nn\nimport model, train\n" + example("class ValueHead")
    head += "model.ValueHead = ValueHead\nfrom support.flags import run_command\n"
    (tmp_path / "head.py").write_text(PATH + head + "run_command(train.main)\n")
    done = command("head.py", *SMALL, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start, last = (
        load_file(tmp_path / "out" / stage / "value_head.safetensors")
        for stage in ("start", "round2")
    )
    names = {f"value_head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(last) == names
    assert all((start[name] != last[name]).any() for name in names)


def test_a_new_dataset(tmp_path, model_folder):
    """Catches a dataset whose rows, or whose way of ending steps, do not reach the search."""
    (tmp_path / "puzzles.py").write_text(PATH + example('["puzzles"]'))
    rows = [{"problem": f"{a}+{b}", "final": str((a + b) % 7)} for a in range(4) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--simulations", "3", "--max-step-tokens", "8", "--max-depth", "3", "--out", "out"]
    words += ["--model", model_folder, "--data", "puzzles:rows.jsonl", "--cache-tokens", "8000"]
    done = command("puzzles.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trees = [json.loads(line) for line in open(tmp_path / "out" / "round1" / "trees-0.jsonl")]
    assert {tree["question"] for tree in trees} <= {row["problem"] for row in rows}
    assert len(trees) == 10  # the last fifth is held out
    breaks = 1  # the token of a line break in the built-in vocabulary
    steps = [node["tokens"] for tree in trees for node in tree["nodes"][1:]]
    assert any(breaks in step[1:-1] for step in steps)  # one line break ends no step here
    check = """
import puzzles, data
print(data.load_questions("puzzles:rows.jsonl")[1])
found = data.DATASETS["puzzles"].steps.steps("One.\\nTwo.\\n\\nThree. #### 2")
assert found == [[("One.\\nTwo.\\n\\n", True)], [("Three. #### 2", True)]], found
"""
    (tmp_path / "steps.py").write_text(PATH + check)
    done = command("steps.py", cwd=tmp_path)
    assert done.returncode == 0 and "rows-2" in done.stdout, done.stderr


def test_a_new_objective(tmp_path):
    """Catches a registry that the commands do not read: the run must log the new loss, not DPO's
    log 2."""
    (tmp_path / "ipo.py").write_text(PATH + example('["ipo"]'))
    words = ["--objective", "ipo", "--rounds", "1", "--min-gap", "0.1", "--search-questions", "30"]
    done = command("ipo.py", *SMALL, *words, "--tune-lr", "1e-9", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    found = [line["policy"] for line in lines if "policy" in line]
    # the policy is its reference
    assert found and found == pytest.approx([(1 / (2 * 0.3)) ** 2] * len(found), rel=1e-3)


def test_a_new_search(tmp_path, model_folder):
    """Catches an answering table that new searches cannot enter, and one that runs another strategy
    in their place."""
    (tmp_path / "dfs.py").write_text(PATH + example('["dfs"]'))
    words = ["dfs.py", "--model", model_folder, "--data", "arithmetic", "--limit", "5"]
    words += ["--max-step-tokens", "8", "--json", "out.json"]
    done = command(*words, "--strategy", "dfs:4", "greedy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert [row["strategy"] for row in answers] == ["dfs:4", "greedy"] and answers[0]["steps"] >= 4
    assert command(*words, "--strategy", "bfs:4", cwd=tmp_path).returncode == 2


def test_a_reward(tmp_path, model_folder):
    """Catches a reward that the search does not use, or that does not do what its text says."""
    (tmp_path / "short.py").write_text(example("def score"))
    check = """
import data, short
question = data.Question("q", "1+1", "2")
texts = ["1+1=2\\n#### 2", "#### 2", "#### 3", "2", "x" * 500 + " #### 2"]
print([round(short.score(question, text), 3) for text in texts])
"""
    (tmp_path / "check.py").write_text(PATH + check)
    done = command("check.py", cwd=tmp_path)
    assert done.stdout == "[0.976, 0.988, -1, -1, 0.2]\n", done.stderr
    words = ["--model", model_folder, "--data", "arithmetic", "--limit", "60", "--max-depth", "3"]
    words += ["--search-temperature", "1", "--max-step-tokens", "8", "--out", "trees.jsonl"]
    done = command(ROOT / "mcts.py", *words, "--reward", "short.py:score", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trees = read_trees(tmp_path / "trees.jsonl")
    rewards = {node.reward for tree in trees for node in tree.nodes}
    assert -1 in rewards and any(0.9 < reward < 1 for reward in rewards - {None}), rewards


def test_a_new_task(tmp_path):
    """Catches a task that only the built-in ones can be: its questions, splits and tokens must
    reach training, search and answers."""
    (tmp_path / "sorting.py").write_text(PATH + example('["sorting"]'))
    words = ["--data", "sorting", *SMALL, "--rounds", "1", "--out", "out"]
    done = command("sorting.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trees = [json.loads(line) for line in open(tmp_path / "out" / "round1" / "trees-0.jsonl")]
    assert len(trees) == 12
    for tree in trees:
        assert tree["answer"] == "".join(sorted(tree["question"])) and len(tree["question"]) == 4


def test_a_new_model_family(tmp_path):
    """Catches a family's checkpoint that loads and computes something else: its logits must be
    those of transformers."""
    (tmp_path / "olmo.py").write_text(PATH + example('["olmo"]'))
    check = """
import torch, transformers, train
import olmo, model
torch.manual_seed(0)
config = transformers.OlmoConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, eos_token_id=2)
twin = transformers.OlmoForCausalLM(config).eval()
twin.save_pretrained("twin")
ours = model.load_model("twin")
token_BT = torch.randint(0, 40, (3, 17))
with torch.inference_mode():
    torch.testing.assert_close(ours(token_BT)[0], twin(token_BT).logits, atol=1e-5, rtol=1e-5)
ours.model.norm.forward = lambda x: x
with torch.inference_mode():
    assert (ours(token_BT)[0] - twin(token_BT).logits).abs().max() > 1e-3
print("equal")
"""
    (tmp_path / "check.py").write_text(PATH + check)
    done = command("check.py", cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr
