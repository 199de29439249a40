"""A small model on GSM8K from end to end, in pieces of a few minutes: SFT, search, SVPO, answers.

    python experiments/gsm8k.py prepare --model DIR --data-dir FOLDER --parts PARTS
                            weights in bfloat16, in files under 60 MB, and the questions
    python experiments/gsm8k.py run --parts PARTS --out runs/gsm8k --minutes 9
                            run it again and again, until it prints "done"
    python experiments/gsm8k.py table --out runs/gsm8k

`run` is train.py and eval.py with the flags below. When its minutes are over it asks them to stop.
They keep the last optimizer step and every searched question, and the next call goes on from there.
--tiny takes a few questions and steps, to see that it runs.
"""

import argparse
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file, save_file

from experiments.bench import flags
from model import load_model
from support.files import read_json
from support.flags import InputError, run_command

LARGEST = 50_000_000  # bytes of a part
STRATEGIES = ("greedy", "majority:5", "beam:1,5", "beam:3,5")
ANSWER = {
    "prompt": ROOT / "prompts" / "plain.txt",
    "max_depth": 8,
    "max_step_tokens": 64,
    "answer_lanes": 1024,
}
TRAIN = {
    "data": "gsm8k:train",
    "test_data": "gsm8k:test",
    "test_limit": 100,
    "sft_steps": 700,
    "sft_batch": 32,
    "sft_lr": 1e-4,
    "rounds": 1,
    "simulations": 16,
    "expand_width": 4,
    "search_rows": 256,
    "cache_tokens": 1500000,
    "tune_batch": 32,
    "tune_lr": 2e-5,
    "save_every": 50,
    "pack_tokens": 16384,
    **ANSWER,
}
TINY_ANSWER = {"limit": 2, "max_step_tokens": 12, "answer_lanes": 8}
TINY_TRAIN = {
    "limit": 6,
    "test_limit": 2,
    "sft_steps": 3,
    "sft_batch": 2,
    "tune_batch": 2,
    "simulations": 2,
    "max_depth": 2,
    "max_step_tokens": 12,
    "search_rows": 2,
    "cache_tokens": 8000,
    "answer_lanes": 8,
}


# ----------------------------------------------------------------------------------------- prepare


def prepare(config):
    """Write the parts of the weights to a folder, with everything else that a run needs."""
    config.parts.mkdir(parents=True, exist_ok=True)
    parts = cut_weights(config.model)
    sizes = []
    for number, part in enumerate(parts):
        file = config.parts / f"part-{number:02}.safetensors"
        save_file(part, file)
        sizes.append(file.stat().st_size)
    for file in config.model.iterdir():
        others = ("model.safetensors.index.json", "checksums.json")  # the weights are rounded
        if file.suffix in (".json", ".jinja") and file.name not in others:
            shutil.copyfile(file, config.parts / file.name)
    questions = config.parts / "gsm8k"
    questions.mkdir(exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copyfile(config.data_dir / "gsm8k" / name, questions / name)
    largest = max(sizes) / 1e6
    print(f"{config.parts}: {len(parts)} parts, the largest of {largest:.1f} MB")


def cut_weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    """A model's weights in bfloat16, without the value head, in parts of at most LARGEST bytes.

    A tensor is cut into pieces of whole rows, NAME#0, NAME#1 and so on.
    """
    parts = [{}]
    size = 0
    for name, tensor in load_model(folder).state_dict().items():
        if name.startswith("value_head."):
            continue
        tensor = tensor.to(torch.bfloat16)
        row = tensor.nbytes // len(tensor)  # bytes
        for number, piece in enumerate(tensor.split(max(1, LARGEST // row))):
            if size + piece.nbytes > LARGEST:
                parts.append({})
                size = 0
            parts[-1][f"{name}#{number}"] = piece.contiguous()
            size += piece.nbytes
    return parts


def join(parts: Path, folder: Path):
    """Put the model's folder together again."""
    if (folder / "config.json").exists():
        return
    pieces = {}  # name of a tensor -> its pieces by number
    for file in sorted(parts.glob("part-*.safetensors")):
        for label, piece in load_file(file).items():
            name, _, number = label.rpartition("#")
            pieces.setdefault(name, {})[int(number)] = piece
    if not pieces:
        raise InputError(f"{parts}: there is no part-*.safetensors in it; run prepare first")
    tensors = {}
    for name, found in pieces.items():
        tensors[name] = torch.cat([found[number] for number in range(len(found))])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # config.json comes last: a folder that has it is complete
    for file in sorted(parts.glob("*.j*"), key=lambda file: file.name == "config.json"):
        shutil.copyfile(file, folder / file.name)


# --------------------------------------------------------------------------------------------- run


def run(config):
    """Go on with training and answering until the minutes are over."""
    end = time.monotonic() + 60 * config.minutes
    join(config.parts, config.out.absolute() / "model")
    if train(config, end) and answer(config, end):
        table(config)
        print("done")
    else:
        print("not done; run the same command again")


def common_flags(config) -> dict:
    """The flags that train.py and eval.py share."""
    where = {"device": config.device, "dtype": config.dtype, "data_dir": config.parts.absolute()}
    return {**where, "seed": config.seed}


def train(config, end: float) -> bool:
    """Run train.py until it ends or the time is over; returns whether it ended."""
    out = config.out.absolute()
    words = TRAIN | (TINY_TRAIN if config.tiny else {}) | common_flags(config)
    words |= {"model": out / "model", "out": out / f"seed{config.seed}"}
    return within([ROOT / "train.py", *flags(**words)], end)


def answer(config, end: float) -> bool:
    """Run eval.py for each stage and strategy without answers; returns whether all ended."""
    folder = config.out.absolute() / f"seed{config.seed}"
    words = ANSWER | (TINY_ANSWER if config.tiny else {}) | common_flags(config)
    for stage, strategy in itertools.product(("sft", "round1"), STRATEGIES):
        name = strategy.replace(":", "-").replace(",", "-")
        file = folder / f"{stage}-{name}.json"
        if file.exists():
            continue
        unfinished = file.with_suffix(".unfinished")
        words |= {"model": folder / stage, "data": "gsm8k:test", "strategy": strategy}
        if not within([ROOT / "eval.py", *flags(**words, json=unfinished)], end):
            return False
        unfinished.rename(file)
    return True


def within(words: list, end: float, grace: float = 40) -> bool:
    """Run a command until it ends or the time is over; returns whether it ended.

    It is asked to stop at `end`, and killed if it has not stopped `grace` seconds later.
    """
    process = subprocess.Popen([sys.executable, *words])
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if process.returncode:
        status = process.returncode
        raise InputError(f"{words[0]} ended with status {status}; its message stands above")
    return True


# ------------------------------------------------------------------------------------------- table


def table(config):
    """Print what has been measured: a line for each answer file, and the steps of each run."""
    print(
        f"\n{'seed':>5} {'stage':8}{'strategy':12}{'questions':>10}{'accuracy %':>14}"
        f"{'sampled tokens':>16}{'seconds':>9}   a question"
    )
    for file in sorted(config.out.glob("seed*/*-*.json")):
        row = read_json(file)["answers"][0]
        seed = file.parent.name.removeprefix("seed")
        stage = file.stem.partition("-")[0]
        print(
            f"{seed:>5} {stage:8}{row['strategy']:12}{row['questions']:>10}"
            f"{100 * row['accuracy']:>7.1f} +- {100 * row['standard_error']:.1f}"
            f"{row['sampled_tokens']:>16.0f}{row['seconds']:>9.3f}"
        )
    for file in sorted(config.out.glob("seed*/log.jsonl")):
        stages = Counter(json.loads(line)["stage"] for line in file.read_text().splitlines())
        steps = [f"{stage} {count} optimizer steps" for stage, count in stages.items()]
        print(f"{file.parent.name}: {', '.join(steps)}")


def main():
    gpu = torch.cuda.is_available()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", choices=["prepare", "run", "table"])
    parser.add_argument("--model", type=Path, help="prepare: folder of the model")
    data_help = "prepare: folder with gsm8k/train.jsonl and gsm8k/test.jsonl"
    parser.add_argument("--data-dir", type=Path, help=data_help)
    parser.add_argument("--parts", type=Path, default=Path("runs/gsm8k-parts"))
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--tiny", action="store_true")
    config = parser.parse_args()
    if config.command == "prepare" and not (config.model and config.data_dir):
        parser.error("prepare needs --model and --data-dir")
    {"prepare": prepare, "run": run, "table": table}[config.command](config)


if __name__ == "__main__":
    run_command(main)
