"""Search from the outside: ranks, interruptions, answering with every strategy, and the benchmark in a tiny mode."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from conftest import ROOT, tiny_config
from data import StepTokenizer, load_questions, read_trees
from eval import rescore
from model import Llama, load_model, save_model
from test_steps import characters_tokenizer

QUESTIONS = 300
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def work(tmp_path, model_folder):
    """A folder with questions, a prompt and a small model; words that name them."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"question": f"{a % 7}+{a % 5}*{a % 6}-3", "answer": "2"}) + "\n"
                                                 for a in range(QUESTIONS)))
    (tmp_path / "prompt.txt").write_text("1+1\n1+1=2 #### 2\n{question}\n")
    return tmp_path, ["--model", model_folder, "--data", "sums.jsonl", "--prompt", "prompt.txt", "--max-step-tokens", "8",
                      "--max-depth", "4", "--simulations", "40", "--search-rows", "4", "--cache-tokens", "12000"]


def start(*words, cwd):
    """A command in a process group of its own; it hears SIGINT also where the tests run in the background of a shell, which does not."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finish(process) -> str:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out


def whole_lines(folder) -> list:
    return [line for path in folder.glob("trees*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]


def test_an_interrupted_search_ends_with_one_tree_a_question(work):
    """Catches trees that are lost, torn or doubled when search is killed, and shares that overlap when the rank count changes."""
    folder, words = work
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for stop, launch in ((signal.SIGKILL, []), (signal.SIGINT, []), (signal.SIGTERM, torchrun)):
        before = len(whole_lines(folder))
        process = start(*launch, ROOT / "mcts.py", *words, "--out", "trees.jsonl", cwd=folder)
        while len(whole_lines(folder)) < before + 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(stop)  # torchrun hands SIGTERM on to its ranks; a SIGKILL they would outlive
        process.communicate(timeout=60)
        if stop == signal.SIGINT:
            assert process.returncode == 130
    assert 9 <= len(whole_lines(folder)) < QUESTIONS, "the search ended before it was killed: make it longer"
    with open(folder / "trees.jsonl", "a") as file:
        file.write('{"id": "torn')
    printed = finish(start(*torchrun, ROOT / "mcts.py", *words, "--out", "trees.jsonl", cwd=folder))
    assert "torn" in printed
    trees = [tree for path in folder.glob("trees*.jsonl") for tree in read_trees(path)]
    assert len(trees) == len({tree.id for tree in trees}) == QUESTIONS
    finish(start(ROOT / "mcts.py", *words, "--out", "once.jsonl", cwd=folder))
    once = {tree.id: tree for tree in read_trees(folder / "once.jsonl")}
    same = sum([node.tokens for node in tree.nodes] == [node.tokens for node in once[tree.id].nodes] for tree in trees)
    assert same >= QUESTIONS - 3  # the samples are those of an uninterrupted search, but for rounding


def test_every_strategy_answers(work):
    """Catches strategies that only run alone, a table without costs, and a diagnosis without trees or a reference."""
    folder, words = work
    strategies = ["greedy", "sampled", "majority:3", "best:3", "beam:2,2", "mcts:3"]
    finish(start(ROOT / "mcts.py", *words, "--limit", "8", "--out", "trees.jsonl", cwd=folder))
    printed = finish(start(ROOT / "eval.py", *words, "--limit", "6", "--strategy", *strategies, "--trees", "trees.jsonl", "--json",
                           "out.json", cwd=folder))
    found = json.loads((folder / "out.json").read_text())
    assert [row["strategy"] for row in found["answers"]] == strategies and all(name in printed for name in strategies)
    cost = {row["strategy"]: row["sampled_tokens"] for row in found["answers"]}
    assert cost["majority:3"] > cost["greedy"] > 0 and "AUC" in printed and found["diagnosis"]["calibration"]
    finish(start(ROOT / "eval.py", *words, "--limit", "2", "--budget", "--json", "curve.json", "--max-step-tokens", "4", cwd=folder))
    assert len(json.loads((folder / "curve.json").read_text())["answers"]) > 20
    assert (folder / "curve.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_tree_files_of_other_searches_are_left_alone(work):
    """Catches a file that only looks like another rank's, names with signs of a pattern, and trees of another tokenizer."""
    folder, words = work
    for name in ("trees-1.jsonl", "trees.jsonl", "t[1].jsonl", "t[1].jsonl"):
        finish(start(ROOT / "mcts.py", *words, "--limit", "2", "--out", name, cwd=folder))
        assert len(read_trees(folder / name)) == 2
    trees = (folder / "trees.jsonl").read_text().replace('"tokens": [', '"tokens": [99999, ').replace('"sampled": [', '"sampled": [false, ')
    (folder / "other.jsonl").write_text(trees)
    process = start(ROOT / "eval.py", *words, "--limit", "2", "--trees", "other.jsonl", cwd=folder)
    assert process.communicate(timeout=60)[1].count("\n") == 1 and process.returncode == 2


def test_benchmark_in_tiny_mode(work):
    """Catches a benchmark whose two sides do not do the same work."""
    folder, words = work
    words = [*words, "--simulations", "4", "--questions", "3", "--live", "2", "--alternations", "1", "--sample-tokens", "4"]
    for side in ("ours", "peer", "sample-ours", "sample-peer"):
        found = json.loads(finish(start(ROOT / "bench.py", "search", *words, "--side", side, cwd=folder)).splitlines()[-1])
        if side in ("ours", "peer"):
            assert 3 <= found["simulations"] <= 12 and found["nodes"] == 4 * found["simulations"]
        else:
            assert found["sampled_tokens"] == 32 * 4
    assert "matrix products" in finish(start(ROOT / "experiments" / "search_speed.py", "profile", *words, cwd=folder))
    assert "two ranks" in finish(start(ROOT / "experiments" / "search_speed.py", "ranks", *words, cwd=folder))


def test_the_7b_command_on_a_tiny_model(tmp_path):
    """Catches flags of the README's 7B command that do not go together: its words, on LLaMA's own configuration made small, two ranks."""
    fields = {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 32,
              "intermediate_size": 48, "initializer_range": 0.02, "max_sequence_length": 2048, "model_type": "llama", "num_attention_heads": 4,
              "num_hidden_layers": 2, "pad_token_id": 0, "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0",
              "use_cache": True, "vocab_size": 97}
    folder = tmp_path / "llama"
    folder.mkdir()
    characters_tokenizer().save(str(folder / "tokenizer.json"))
    save_model(Llama(tiny_config(vocab_size=97, num_key_value_heads=4)).init_weights(0), folder)
    (folder / "value_head.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(fields))
    for name, rows in {"gsm8k/train": [{"question": f"{a}+1?", "answer": f"{a}+1=<<{a}+1={a + 1}>>{a + 1}\n#### {a + 1}"} for a in range(8)],
                       "gsm8k/test": [{"question": f"{a}+2?", "answer": f"{a}+2={a + 2}\n#### {a + 2}"} for a in range(3)],
                       "math/train": [{"problem": f"{a}+3?", "solution": f"It is $\\boxed{{{a + 3}}}$.", "answer": f"{a + 3}"} for a in range(4)]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = re.search(r"    torchrun --nproc-per-node 8 (train.py --model llama-7b .*(?:\n        .*)*)", (ROOT / "README.md").read_text())[1]
    words = [str(ROOT / word) if word.startswith("prompts/") else word for word in command.replace("\\\n", " ").split()[3:]]
    smaller = ["--sft-steps", "2", "--sft-batch", "4", "--simulations", "2", "--max-step-tokens", "12", "--max-depth", "2", "--tune-batch", "8",
               "--rounds", "1", "--search-rows", "4", "--cache-tokens", "8000", "--answer-lanes", "16", "--device", "cpu"]
    printed = finish(start("-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py", "--model", folder, *words, *smaller,
                           "--data-dir", ".", "--out", "run", cwd=tmp_path))
    assert "12 trees" in printed and "3 unseen questions" in printed
    assert load_model(tmp_path / "run" / "round1").config.rms_norm_eps == 1e-6
    plan = finish(start(ROOT / "train.py", "--model", "llama-7b", *words, "--plan", cwd=tmp_path))
    assert "80 GB" not in plan or "fits on 2, 4, 8, 64" in plan and "may end early" not in plan


def test_trees_of_a_few_shot_prompt_are_trained_under_another(work):
    """Catches a reference pass, losses or answers under the prompt of the search where --train-prompt names another."""
    folder, words = work
    (folder / "plain.txt").write_text("{question}\n")
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()[:20]]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word if word != "sums.jsonl" else "few.jsonl" for word in words]
    finish(start(ROOT / "train.py", *words, "--train-prompt", "plain.txt", "--tune-epochs", "1", "--out", "run", cwd=folder))
    trees = read_trees(folder / "run" / "round1" / "trees-0.jsonl")
    tokenizer = StepTokenizer.load(folder / "model")
    assert all(tokenizer.tokenizer.decode(tree.nodes[0].tokens).startswith("1+1") for tree in trees)  # the search saw the examples
    with safe_open(folder / "run" / "round1" / "reference.safetensors", "pt") as file:
        stored = file.get_tensor("logp")
    found = {tree.id: tree for tree in trees}
    questions = load_questions(str(folder / "few.jsonl"))[:16]  # the last fifth is held out
    plain = rescore(load_model(folder / "model"), [tokenizer.set_prompt(found[question.id], question) for question in questions])
    torch.testing.assert_close(stored, torch.tensor([node.logp for tree in plain for node in tree.nodes]), atol=1e-3, rtol=1e-4)
