"""A small model on GSM8K end to end, in pieces of a few minutes: SFT, search, SVPO, answers; one table.

    python experiments/gsm8k.py prepare --model DIR --data-dir FOLDER --parts PARTS     weights in bfloat16, in files under 60 MB, and the questions
    python experiments/gsm8k.py run --parts PARTS --out runs/gsm8k --minutes 9          again and again, until it says that it is done
    python experiments/gsm8k.py table --out runs/gsm8k

`run` is train.py and eval.py with the flags below. When its minutes are over it asks them to stop, which keeps the last optimizer step and every
searched question; the next call goes on. --tiny: a few questions and steps, only to see that it runs.
"""
import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from data import InputError, run_command  # noqa: E402
from model import load_model  # noqa: E402
from support.files import read_json  # noqa: E402

LARGEST = 50_000_000  # bytes of a part
STRATEGIES = ("greedy", "majority:5", "beam:1,5", "beam:3,5")
ANSWER = ["--prompt", str(ROOT / "prompts" / "plain.txt"), "--max-depth", "8", "--max-step-tokens", "64", "--answer-lanes", "1024"]
TRAIN = ["--data", "gsm8k:train", "--test-data", "gsm8k:test", "--test-limit", "100", "--sft-steps", "700", "--sft-batch", "32", "--sft-lr", "1e-4", "--rounds", "1",
         "--simulations", "16", "--expand-width", "4", "--search-rows", "256", "--cache-tokens", "1500000", "--tune-batch", "32", "--tune-lr", "2e-5", "--save-every", "50",
         "--pack-tokens", "16384", *ANSWER]
TINY = ["--limit", "6", "--sft-steps", "3", "--sft-batch", "2", "--simulations", "2", "--max-step-tokens", "12", "--max-depth", "2", "--search-rows", "2", "--cache-tokens", "8000",
        "--tune-batch", "2", "--test-limit", "2", "--answer-lanes", "8"]


def prepare(config):
    """Cut the weights into parts, in a folder of their own with everything else that a run needs."""
    model, parts, size = load_model(config.model), [{}], 0
    for name, tensor in model.state_dict().items():
        if name.startswith("value_head."):
            continue
        tensor = tensor.to(torch.bfloat16)
        for number, piece in enumerate(tensor.split(max(1, LARGEST // (tensor.nbytes // len(tensor))))):
            if size + piece.nbytes > LARGEST:
                parts.append({})
                size = 0
            parts[-1][f"{name}#{number}"] = piece.contiguous()
            size += piece.nbytes
    config.parts.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        save_file(part, config.parts / f"part-{number:02}.safetensors")
    for path in config.model.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            shutil.copyfile(path, config.parts / path.name)
    (config.parts / "gsm8k").mkdir(exist_ok=True)
    for split in ("train", "test"):
        shutil.copyfile(config.data_dir / "gsm8k" / f"{split}.jsonl", config.parts / "gsm8k" / f"{split}.jsonl")
    print(f"{config.parts}: {len(parts)} parts, the largest of {max(path.stat().st_size for path in config.parts.glob('part-*')) / 1e6:.1f} MB")


def join(parts: Path, folder: Path):
    """The model's folder again."""
    if (folder / "config.json").exists():
        return
    found = {}
    for path in sorted(parts.glob("part-*.safetensors")):
        for name, tensor in load_file(path).items():
            name, _, number = name.rpartition("#")
            found.setdefault(name, {})[int(number)] = tensor
    if not found:
        raise InputError(f"{parts}: there is no part-*.safetensors in it; run prepare first")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.cat([pieces[number] for number in range(len(pieces))]) for name, pieces in found.items()}, folder / "model.safetensors", {"format": "pt"})
    for path in sorted(parts.glob("*.j*"), key=lambda path: path.name == "config.json"):
        shutil.copyfile(path, folder / path.name)


def within(words: list, end: float) -> bool:
    """Run a command until it ends or its time is over; whether it ended."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if process.returncode:
        raise InputError(f"{words[0]} ended with status {process.returncode}; its message stands above")
    return True


def run(config):
    end, out = time.monotonic() + 60 * config.minutes, config.out.absolute()
    join(config.parts, out / "model")
    where = ["--device", config.device, "--dtype", config.dtype, "--data-dir", config.parts.absolute()]
    smaller = TINY if config.tiny else []
    if not within([ROOT / "train.py", "--model", out / "model", *TRAIN, *smaller, *where, "--seed", config.seed, "--out", out / f"seed{config.seed}"], end):
        return print("not done: call again")
    for stage in ("sft", "round1"):
        for strategy in STRATEGIES:
            path = out / f"seed{config.seed}" / f"{stage}-{strategy.replace(':', '-').replace(',', '-')}.json"
            if not path.exists():
                aside = path.with_suffix(".unfinished")
                words = ["--model", out / f"seed{config.seed}" / stage, "--data", "gsm8k:test", "--strategy", strategy, "--json", aside, *ANSWER, *where, "--seed", config.seed]
                if not within([ROOT / "eval.py", *words, *(["--limit", "2", "--max-step-tokens", "12", "--answer-lanes", "8"] if config.tiny else [])], end):
                    return print("not done: call again")
                aside.rename(path)
    table(config)
    print("done")


def table(config):
    print(f"\n{'seed':>5} {'stage':8}{'strategy':12}{'questions':>10}{'accuracy %':>14}{'sampled tokens':>16}{'seconds':>9}   a question")
    for path in sorted(config.out.glob("seed*/*-*.json")):
        row = read_json(path)["answers"][0]
        print(f"{path.parent.name[4:]:>5} {path.stem.partition('-')[0]:8}{row['strategy']:12}{row['questions']:>10}{100 * row['accuracy']:>7.1f} +- {100 * row['standard_error']:.1f}"
              f"{row['sampled_tokens']:>16.0f}{row['seconds']:>9.3f}")
    for path in sorted(config.out.glob("seed*/log.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        print(f"{path.parent.name}: " + ", ".join(f"{stage} {sum(row['stage'] == stage for row in rows)} optimizer steps" for stage in dict.fromkeys(row["stage"] for row in rows)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "run", "table"])
    parser.add_argument("--model", type=Path, help="prepare: folder of the model")
    parser.add_argument("--data-dir", type=Path, help="prepare: folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    parser.add_argument("--parts", type=Path, default=Path("runs/gsm8k-parts"))
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--tiny", action="store_true")
    config = parser.parse_args()
    if config.command == "prepare" and not (config.model and config.data_dir):
        parser.error("prepare needs --model and --data-dir")
    {"prepare": prepare, "run": run, "table": table}[config.command](config)


if __name__ == "__main__":
    run_command(main)
