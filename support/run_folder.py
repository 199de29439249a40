"""The run folder of train.py, and what is refused before anything is written to it."""
import json
import os
import zlib
from importlib.util import find_spec
from pathlib import Path

from data import StepTokenizer, solution_tree
from support.files import head_commit, hold, keep_config
from support.flags import InputError
from support.ranks import once
from svpo import OBJECTIVES
from tasks.questions import TASKS, is_built_in


def check_flags(run, train, losses):
    """Refuse flags that do not go together."""
    if is_built_in(run.data) and ":" in run.data:
        raise InputError(f"--data {run.data}: training takes all splits of a built-in task: --data {run.data.split(':')[0]}")
    if (run.model == "tiny") != is_built_in(run.data):
        raise InputError(f"--model tiny and the built-in tasks ({', '.join(TASKS)}) go together, and --data {run.data} is not one of these; real questions need a real --model"
                         if run.model == "tiny" else f"--data {run.data} is a built-in task, which only --model tiny can be trained on")
    if run.model == "tiny" and (run.chat or run.steps != "lines"):
        raise InputError("--chat and --steps xml need a real --model: the tiny one learns lines")
    if losses.objective not in OBJECTIVES.keys() - {"sft"}:
        raise InputError(f"--objective {losses.objective}: there are {', '.join(sorted(OBJECTIVES.keys() - {'sft'}))}")
    objective = OBJECTIVES[losses.objective]
    if objective.likelihood and not losses.sft_weight and not objective.pairs and not objective.value:
        raise InputError(f"--sft-weight 0 leaves --objective {losses.objective} nothing to learn from")
    if train.tensorboard and not find_spec("tensorboard"):
        raise InputError("--tensorboard needs a package that is not installed: pip install tensorboard")


def check_lengths(tokenizer: StepTokenizer, plain: StepTokenizer, context: int, train, search, splits: dict):
    """Refuse questions and solutions that do not fit into the model's context, and SFT without solutions."""
    for question in [question for name in ("valid", "test") for question in splits[name]] + sum(splits["search"], []):
        tokenizer.encode_prompt(question, context - search.max_step_tokens)
        plain.encode_prompt(question, context - search.max_step_tokens)
    if train.sft_steps and not splits["sft"]:
        raise InputError("--sft-steps needs questions with worked solutions, and there is none")
    for question in splits["sft"] if train.sft_steps else []:
        length = sum(len(node.tokens) for node in solution_tree(question, plain).nodes)
        if length > context:
            raise InputError(f"question {question.id}: prompt and solution have {length} tokens, the model's context {context}")


def open_run(folder: Path, stages: tuple, splits: dict):
    """Make the run folder, or check that it belongs to the same configuration and questions; other processes are kept away."""
    if folder.exists() and not (folder / "config.json").exists() and any(path.name not in ("lock", "config.json.partial") for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run; choose another --out")
    once(lambda: None)  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder / "lock")
    text = json.dumps([[question.text, question.answer] for name in ("sft", "valid", "test") for question in splits[name]] + [
        [question.text, question.answer] for part in splits["search"] for question in part])
    keep_config(folder / "config.json", stages, free=("out", "device", "plan", "keep", "tensorboard"), write=not int(os.environ.get("RANK", 0)), commit=head_commit(),
                questions=zlib.crc32(text.encode()))
