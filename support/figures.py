"""Figures of a run folder and of answers at several budgets. They need matplotlib."""

from collections.abc import Callable
from pathlib import Path

from support.files import read_json
from support.flags import InputError
from support.progress import read_log
from support.tables import ANSWERS


def open_plots():
    """matplotlib.pyplot, drawing into files; InputError if the package is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need a package that is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def stage_order(file: Path) -> tuple:
    """The sort key of a stage's file: start or sft, then round1, round2, ..., round10."""
    name = file.parent.name
    return name not in ("start", "sft"), len(name), name


def draw_run(run: Path, calibrate: Callable[[Path], list[dict]]) -> Path:
    """Draw RUN/figures.png: accuracy by stage, loss terms, calibration of V, and a budget curve.

    `calibrate(model folder)` returns the calibration of V in eval.diagnose's form, empty if it
    cannot be measured. The curve is drawn if eval.py --budget has left a curve.json in the run.
    """
    pyplot = open_plots()
    stages = sorted(run.glob("*/eval.json"), key=stage_order)
    if not stages:
        raise InputError(f"{run}: no finished stage (eval.json) in this run folder")
    chart, ((accuracy, log), (calibration, budget)) = pyplot.subplots(2, 2, figsize=(11, 8))
    draw_accuracy(accuracy, stages)
    draw_log(log, [row for _, row in read_log(run / "log.jsonl")])
    for file in stages:
        # the stage "start" is the model as it was given, which may lie elsewhere
        folder = file.parent if (file.parent / "config.json").exists() else run
        draw_calibration(calibration, calibrate(folder), file.parent.name)
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    title = "calibration of V on validation trees"
    calibration.set(xlabel="(V + 1) / 2", ylabel="share of correct ends", title=title)
    curves = sorted(run.glob("**/curve.json"))
    if curves:
        plot_budget(budget, read_json(curves[0], ANSWERS)["answers"])
        budget.set_title(str(curves[0].relative_to(run)))
    else:
        budget.set_title("no curve.json here (eval.py --budget --json)")
    for axes in (accuracy, log, calibration):
        axes.legend()
    chart.tight_layout()
    chart.savefig(run / "figures.png", dpi=110)
    return run / "figures.png"


def draw_accuracy(axes, stages: list[Path]):
    """The accuracy of each strategy by stage, from the stages' eval.json files."""
    names = [file.parent.name for file in stages]
    rows = [read_json(file, ANSWERS)["answers"] for file in stages]
    for answers in zip(*rows):
        percents = [100 * answer["accuracy"] for answer in answers]
        errors = [100 * answer["standard_error"] for answer in answers]
        label = answers[0]["strategy"]
        axes.errorbar(names, percents, errors, marker="o", capsize=2, label=label)
    axes.set(ylabel="accuracy in %", title=f"{rows[0][0]['questions']} test questions")


def draw_calibration(axes, cells: list[dict], label: str):
    """V as a chance against the share of correct ends, of one stage."""
    if cells:
        predicted = [cell["predicted"] for cell in cells]
        axes.plot(predicted, [cell["found"] for cell in cells], marker="o", label=label)


def draw_log(axes, lines: list[dict]):
    """The loss terms of a run, as means over a hundredth of its steps; a line marks each stage."""
    width = max(1, len(lines) // 100)
    for name in ("sft", "policy", "mse", "margin"):
        places, means = [], []
        for place in range(0, len(lines), width):
            part = [line.get(name) for line in lines[place : place + width]]
            part = [figure for figure in part if isinstance(figure, (int, float))]
            if part:
                places.append(place)
                means.append(sum(part) / len(part))
        axes.plot(places, means, label=name)
    for place in range(1, len(lines)):
        if lines[place - 1]["stage"] != lines[place]["stage"]:
            axes.axvline(place, color="grey", linewidth=0.8)
    axes.set(xlabel="optimizer step", yscale="log", title=f"loss terms, means over {width} steps")


def draw_budget(answers: list[dict], file: Path):
    """Draw accuracy against sampled tokens a question; says so if matplotlib is not installed."""
    try:
        pyplot = open_plots()
    except InputError as missing:
        print(f"the curve is not drawn: {missing}")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    plot_budget(axes, answers)
    axes.set(title=f"{answers[0]['questions']} questions")
    figure.tight_layout()
    figure.savefig(file)


def plot_budget(axes, answers: list[dict]):
    """Plot accuracy against sampled tokens, one line for each kind of strategy."""
    kinds = {}
    for row in answers:
        kinds.setdefault(row["strategy"].partition(":")[0], []).append(row)
    for kind, rows in kinds.items():
        rows.sort(key=lambda row: row["sampled_tokens"])
        tokens = [row["sampled_tokens"] for row in rows]
        percents = [100 * row["accuracy"] for row in rows]
        errors = [100 * row["standard_error"] for row in rows]
        axes.errorbar(tokens, percents, errors, marker="o", capsize=2, label=kind)
    axes.set(xscale="log", xlabel="sampled tokens a question", ylabel="accuracy in %")
    axes.legend()
