"""What a command shows while it works: progress, the lines of log.jsonl, and TensorBoard."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from support.files import append, json_object, read_text, sealed
from support.ranks import rank

LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
WATCHED = ("loss", "policy", "reward_accuracy", "mse", "value_accuracy")  # shown beside the bar


class Lines:
    """Where progress is written if stderr is not a terminal: a line now and then, not a bar."""

    def write(self, text: str):
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(items, label: str, total: int, unit: str, first: int = 0) -> tqdm:
    """Show progress over `items` on rank 0: a bar on a terminal, else a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        label,
        total,
        initial=first,
        unit=unit,
        mininterval=1.0 if terminal else 30.0,
        maxinterval=30.0,
        dynamic_ncols=terminal,
        disable=rank() > 0,
        **({} if terminal else {"file": Lines(), "delay": 5, "bar_format": LINE}),
    )


def open_board(run: Path):
    """TensorBoard's writer, into a folder of the run; needs the package tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def log_step(bar: tqdm, board, stage: Path, step: int, figures: dict[str, float]):
    """Write an optimizer step to log.jsonl (rank 0) and to `board` if there is one, and show it."""
    rounded = {name: float(f"{value:.9g}") for name, value in figures.items()}
    if not bar.disable:
        line = json.dumps(sealed({"stage": stage.name, "step": step, **rounded}))
        append(stage.parent / "log.jsonl", line + "\n")
    if board:
        for name, value in figures.items():
            board.add_scalar(f"{stage.name}/{name}", value, step)
    shown = [f"{name} {figures[name]:.3f}" for name in WATCHED if name in figures]
    shown.append(f"{figures['unique_tokens_s']:.0f} tokens/s")
    bar.set_postfix_str(", ".join(shown), refresh=False)


def read_log(log: Path) -> list[tuple[str, dict]]:
    """(line, object) of each whole line of log.jsonl; InputError names the line of a bad one."""
    lines = read_text(log).splitlines(keepends=True)
    whole = enumerate((line for line in lines if line.endswith("\n")), 1)
    shape = {"stage": str, "step": int}
    return [(line, json_object(line, f"{log}, line {n}", shape)) for n, line in whole]
