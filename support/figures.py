"""Figures of a run folder: accuracy by stage, the log, calibration of V, and accuracy against sampled tokens where that was measured."""
import json
from pathlib import Path

from data import read_trees
from support.files import read_json
from support.reports import plot_budget
from svpo import InputError


def draw_run(folder: Path, judge) -> Path:
    """Draw RUN/figures.png; needs matplotlib. `judge(model folder, trees)` is a diagnosis (support.diagnosis) of the trees by that model."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--figures needs a package that is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    stages = sorted(folder.glob("*/eval.json"), key=lambda path: (path.parent.name not in ("start", "sft"), len(path.parent.name), path.parent.name))
    if not stages:
        raise InputError(f"{folder}: no finished stage (eval.json) in this run folder")
    rows, names = [read_json(path) for path in stages], [path.parent.name for path in stages]
    chart, ((accuracy, log), (calibration, budget)) = pyplot.subplots(2, 2, figsize=(11, 8))
    for index, answer in enumerate(rows[0]["answers"]):
        found = [row["answers"][index] for row in rows]
        accuracy.errorbar(names, [100 * cell["accuracy"] for cell in found], [100 * cell["standard_error"] for cell in found], marker="o", capsize=2, label=answer["strategy"])
    accuracy.set(ylabel="accuracy in %", title=f"{rows[0]['answers'][0]['questions']} test questions")
    draw_log(log, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    trees = next((read_trees(path) for path in folder.glob("*/valid-trees.jsonl")), [])
    for path in stages if trees else ():
        cells = judge(path.parent if (path.parent / "config.json").exists() else folder, trees)["calibration"]
        calibration.plot([cell["predicted"] for cell in cells], [cell["found"] for cell in cells], marker="o", label=path.parent.name)
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.set(xlabel="(V + 1) / 2", ylabel="share of correct ends", title="calibration of V on validation trees")
    curves = sorted(folder.glob("**/curve.json"))
    if curves:
        plot_budget(budget, read_json(curves[0])["answers"])
    budget.set_title(str(curves[0].relative_to(folder)) if curves else "no curve.json here (eval.py --budget --json)")
    for axes in (accuracy, log, calibration):
        axes.legend()
    chart.tight_layout()
    chart.savefig(folder / "figures.png", dpi=110)
    return folder / "figures.png"


def draw_log(axes, lines: list[dict]):
    """The loss terms of a run, means over a hundredth of its steps, with a line where a stage ends."""
    width = max(1, len(lines) // 100)
    for name in ("sft", "policy", "mse", "margin"):
        parts = [(place, [line[name] for line in lines[place:place + width] if name in line]) for place in range(0, len(lines), width)]
        parts = [(place, part) for place, part in parts if part]
        axes.plot([place for place, _ in parts], [sum(part) / len(part) for _, part in parts], label=name)
    for place, (before, after) in enumerate(zip(lines, lines[1:]), 1):
        if before["stage"] != after["stage"]:
            axes.axvline(place, color="grey", linewidth=0.8)
    axes.set(xlabel="optimizer step", yscale="log", title=f"loss terms, means over {width} steps")
