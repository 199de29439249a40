"""The scripts for a GPU in their tiny modes, on whatever device is there."""
import json
import subprocess
import sys

from conftest import ROOT, tiny_config
from model import Llama, load_model, save_model
from test_steps import characters_tokenizer


def test_gpu_benchmark(tmp_path):
    """Catches a benchmark that cannot start when a GPU is there at last: all parts, all figures."""
    done = subprocess.run([sys.executable, ROOT / "bench.py", "gpu", "--tiny", "--json", "out.json"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["bandwidth"] > 0 and found["rate"] > 0 and len(found["decoding"]) == 4
    assert all(0 < row["floor"] < row["seconds"] for row in found["decoding"])
    assert found["training"][0]["pairs"] > 0 and 0 < found["training"][0]["share"] < 1 and found["training"][0]["pairwise_tokens"] > found["training"][0]["tokens"]
    assert "ours" in found["search"] and "peer" in found["search"]


def test_gsm8k_in_pieces(tmp_path):
    """Catches parts that do not make the same model, a stop that loses work, and a table with rows missing."""
    folder = tmp_path / "model"
    save_model(Llama(tiny_config(vocab_size=97)).init_weights(0), folder)
    characters_tokenizer().save(str(folder / "tokenizer.json"))
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps({"question": f"{split} {a}+1?", "answer": f"{a}+1={a + 1}\n#### {a + 1}"}) + "\n" for a in range(count)))
    words = [sys.executable, ROOT / "experiments" / "gsm8k.py"]
    assert "1 parts" in subprocess.run([*words, "prepare", "--model", folder, "--data-dir", ".", "--parts", "parts"], cwd=tmp_path, capture_output=True, text=True).stdout
    run = [*words, "run", "--parts", "parts", "--out", "out", "--tiny", "--minutes"]
    first = subprocess.run([*run, "0.02"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert first.returncode == 0 and "not done: call again" in first.stdout, first.stderr[-2000:]
    done = subprocess.run([*run, "9"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-2000:]
    table = done.stdout.split("sampled tokens")[-1]
    assert all(table.count(name) >= 2 for name in ("greedy", "majority:5", "beam:1,5", "beam:3,5")) and "sft 3 optimizer steps" in table
    wanted, found = load_model(folder).bfloat16().float().state_dict(), load_model(tmp_path / "out" / "model").state_dict()
    assert all((wanted[name] == found[name]).all() for name in wanted if "value_head" not in name)
