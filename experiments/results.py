"""Make every table and figure of RESULTS.md from experiments/results.jsonl and why.jsonl; the text around them is left as it is.

    python experiments/results.py            needs matplotlib for the figures

A table stands in RESULTS.md between `<!-- NAME -->` and `<!-- end -->`. Cells are means over seeds with their standard error.
"""
import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
ANSWERS = {  # heading -> figure of a line of results.jsonl
    "greedy": lambda row: 100 * row["figures"]["greedy"],
    "majority@5": lambda row: 100 * row["figures"]["majority:5"],
    "SBS(1,5)": lambda row: 100 * row["figures"]["beam:1,5"],
    "SBS(3,5)": lambda row: 100 * row["figures"]["beam:3,5"],
}
SIBLINGS = {"siblings own": lambda row: row["siblings_own"], "siblings fixed": lambda row: row["siblings_fixed"]}
TOKENS = {"unique tokens, millions": lambda row: row["searched_tokens"] / 1e6, "seconds": lambda row: row["training_seconds"]}
SAMPLED = {"sampled tokens, millions": lambda row: row["sampled_tokens"] / 1e6, "seconds": lambda row: row["training_seconds"]}
COLUMNS = {  # table -> its columns
    "objectives": ANSWERS | SIBLINGS | TOKENS,
    "ablation": ANSWERS | SIBLINGS | SAMPLED,
    "compute": ANSWERS | SAMPLED | {"tokens an answer, greedy": lambda row: row["answers"]["greedy"]["sampled_tokens"],
                                    "ms an answer, greedy": lambda row: 1000 * row["answers"]["greedy"]["seconds"],
                                    "tokens, SBS(3,5)": lambda row: row["answers"]["beam:3,5"]["sampled_tokens"],
                                    "ms, SBS(3,5)": lambda row: 1000 * row["answers"]["beam:3,5"]["seconds"]},
    "transfer": ANSWERS | SIBLINGS | {"wholly sound": lambda row: 100 * row["sound"], "of the right, unsound": lambda row: 100 * row["right_with_wrong_steps"]},
}
SEARCHED = (  # of table "transfer": heading, figure, factor, digits
    ("right answers after an unsound step, %", "right_with_wrong_steps", 100, 1), ("mean Q of steps that are sound, as all before them are", "q_of_sound", 1, 2),
    ("mean Q of the others", "q_of_unsound", 1, 2), ("the others with Q > 0, %", "unsound_with_positive_q", 100, 1),
    ("pairs of a sound and an unsound sibling that prefer the sound one, %", "sound_preferred", 100, 1))
PRECISION = {"siblings own": 3, "siblings fixed": 3, "unique tokens, millions": 2, "sampled tokens, millions": 2, "seconds": 0}
SIZES = ("28 k", "97 k", "297 k", "666 k")  # of run.py; 297 k is the tiny model of the other tables
NOTES = {
    "objectives": "Unique tokens: of the trees, or groups, learned from; a step that was sampled twice counts once.",
    "ablation": "\"Values without search\" samples whole solutions at temperature 1, all others search at 0.7. Seconds are rough: two or three processes ran at once, one thread each.", "compute": "Two processes at once, one thread each; during `grpo, 2 passes` of seed 0 for two minutes a third.",
    "transfer": "Two processes at once, one thread each.", "scale": "297 k: from table 1.", "why": ""}


def mean(values: list[float], digits: int) -> str:
    values = [value for value in values if value is not None]
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}" if values else "-"


def lay_out(headings: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|", *("| " + " | ".join(line) + " |" for line in lines)]


def source(rows: list[dict], command: str, name: str) -> list[str]:
    commits, seeds = sorted({row["commit"] for row in rows}), sorted({row["seed"] for row in rows})
    questions = f"; {rows[0]['questions']} test questions each" if "questions" in rows[0] else ""
    seconds = " Seconds: search and training, without SFT and answering." if "seconds" in COLUMNS.get(name, {}) else ""
    return ["", f"Seeds {', '.join(map(str, seeds))}{questions}; commit {', '.join(commits)}; `{command}`.{seconds} {NOTES[name]}".rstrip()]


def table(rows: list[dict]) -> str:
    """A Markdown table of one table's rows: a line for each row's name, in the order in which they were measured."""
    name = rows[0]["table"]
    if name == "scale":
        return scale_table(rows)
    base = {row["seed"]: row["figures"] for row in rows if row["row"] == "svpo"}
    paired = {"greedy - svpo's": "greedy", "SBS(3,5) - svpo's": "beam:3,5"} if base else {}  # all rows of a seed start from the same model and trees
    lines = [[label, *(mean([figure(row) for row in rows if row["row"] == label], PRECISION.get(heading, 1)) for heading, figure in COLUMNS[name].items()),
              *(mean([100 * (row["figures"][key] - base[row["seed"]][key]) for row in rows if row["row"] == label and row["seed"] in base], 1) for key in paired.values())]
             for label in dict.fromkeys(row["row"] for row in rows)]
    searched = [row["search"] for row in rows if row["row"] == "svpo" and "search" in row]  # the trees that all rows of a seed learn from
    more = ["", *lay_out(["in the trees", "mean over seeds"], [[heading, mean([factor * found[key] for found in searched], digits)]
                                                              for heading, key, factor, digits in SEARCHED])] if searched else []
    return "\n".join(lay_out(["", *COLUMNS[name], *paired], lines) + more + source(rows, f"python experiments/run.py {name}", name))


def by_size(rows: list[dict]) -> dict[str, list[dict]]:
    """Of each size the figures of its seeds: greedy before and after, gains of training and of SBS."""
    found = {}
    for size in SIZES:
        mine = {(row["row"].rpartition(", ")[2], row["seed"]): row for row in rows if row["row"] in ((f"{size}, sft", f"{size}, svpo") if size != "297 k" else ("sft", "svpo"))
                and row["table"] == ("scale" if size != "297 k" else "objectives")}
        for (name, seed), after in mine.items():
            if name == "svpo" and ("sft", seed) in mine:
                sft, greedy, beam = mine["sft", seed], 100 * after["figures"]["greedy"], 100 * after["figures"]["beam:3,5"]
                found.setdefault(size, []).append({"SFT, greedy": 100 * sft["figures"]["greedy"], "SVPO, greedy": greedy, "gain": greedy - 100 * sft["figures"]["greedy"],
                                                   "SVPO, SBS(3,5)": beam, "over greedy": beam - greedy, "siblings fixed": after["siblings_fixed"]})
    return found


def scale_table(rows: list[dict]) -> str:
    rows = rows + [row for row in read("results.jsonl") if row["table"] == "objectives" and row["row"] in ("sft", "svpo")]
    found = by_size(rows)
    headings = list(next(iter(found.values()))[0])
    lines = [[size, *(mean([seed[heading] for seed in seeds], PRECISION.get(heading, 1)) for heading in headings)] for size, seeds in found.items()]
    return "\n".join(lay_out(["parameters", *headings], lines) + source(rows, "python experiments/run.py scale", "scale"))


def why_tables(rows: list[dict]) -> str:
    """Pairs and judges by depth, agreement with roll-outs, calibration."""
    measured = [row for row in rows if "stage" in row]
    kinds = list(dict.fromkeys((row["stage"], row["trees"]) for row in measured))
    lines = []
    for stage, trees in kinds:
        mine = [row for row in measured if (row["stage"], row["trees"]) == (stage, trees)]
        depths = [{entry["depth"]: entry for entry in row["diagnosis"]["by_depth"]} for row in mine]
        for depth in sorted(set.intersection(*map(set, depths))):  # those that all seeds have
            entries = [found[depth] for found in depths]
            judges = {judge: mean([entry[judge] for entry in entries], 3) for judge in ("value", "implicit_reward", "mean_logp")}
            judges |= {} if trees == "the sft policy" else {"implicit_reward": "-"}  # a policy that is its own reference
            lines.append([f"{stage}, {trees}", str(depth), mean([entry["pairs_a_tree"] for entry in entries], 2), *judges.values()])
    first = lay_out(["model, trees of", "depth", "pairs a tree", "V", "implicit reward", "mean log-probability"], lines)
    lines = []
    for stage, trees in kinds:
        mine = [row for row in measured if (row["stage"], row["trees"]) == (stage, trees) and "q" in row]
        picks = {"Q": lambda row: row["q"], "Q, roll-outs within 0.9": lambda row: row["undecided"], "Q, depth 1": lambda row: row["by_depth"]["1"],
                 "Q, depth 2": lambda row: row["by_depth"]["2"], "V": lambda row: row["v"]}
        for label, pick in picks.items():
            found = [pick(row) for row in mine if pick(row)]
            if mine and len(found) == len(mine):  # those that all seeds have
                lines.append([f"{stage}, {trees}", label, *(mean([part[name] for part in found], 3) for name in ("correlation", "error", "same_sign")),
                              mean([row["diagnosis"]["calibration_error"] for row in mine], 3) if label == "V" else ""])
    second = lay_out(["model, trees of", "against 64 roll-outs", "correlation", "mean absolute error", "same sign", "calibration error"], lines)
    return "\n".join(first + [""] + second + source(measured, "python experiments/why.py --seed N", "why"))


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()] if (HERE / name).exists() else []


# --------------------------------------------------------------------------------------------- figures

def errorbars(axes, places, groups: list[list[float]], label: str, **style):
    """Means with standard errors."""
    axes.errorbar(places, [statistics.fmean(values) for values in groups],
                  [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0 for values in groups], capsize=2, label=label, **style)


def draw_rows(pyplot, rows: list[dict]):
    """Accuracy of each row, a marker a way of answering."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    chart, axes = pyplot.subplots(figsize=(8, 4.5))
    for place, (heading, figure) in enumerate(ANSWERS.items()):
        errorbars(axes, [index + 0.12 * (place - 1.5) for index in range(len(names))], [[figure(row) for row in rows if row["row"] == name] for name in names], heading, fmt="o")
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set(ylabel="accuracy in %", title=f"{rows[0]['questions']} test questions, mean and standard error over seeds")
    axes.legend()
    return chart


def draw_scale(pyplot, rows: list[dict]):
    """Accuracy and gains against size."""
    from run import count_parameters  # here, because it loads torch
    found = by_size(rows)
    chart, pair = pyplot.subplots(1, 2, figsize=(9, 4))
    for axes, headings in zip(pair, (("SFT, greedy", "SVPO, greedy", "SVPO, SBS(3,5)"), ("gain", "over greedy"))):
        for heading in headings:
            errorbars(axes, [count_parameters(size) for size in found], [[seed[heading] for seed in seeds] for seeds in found.values()],
                      {"gain": "SVPO over SFT, both greedy", "over greedy": "SBS(3,5) over greedy, both SVPO"}.get(heading, heading), marker="o")
        axes.set(xscale="log", xlabel="parameters, log scale", ylabel="accuracy in %" if "gain" not in headings else "points")
        axes.set_xticks([count_parameters(size) for size in found], list(found))
        axes.minorticks_off()
        axes.legend()
    pair[1].axhline(0, color="grey", linewidth=0.8)
    return chart


def draw_why(pyplot, rows: list[dict]):
    """Q against roll-outs, calibration of V, and the preference loss of runs that fare differently."""
    measured, logs = [row for row in rows if "stage" in row], [row for row in rows if "curves" in row and row["seed"] == 0]
    chart, ((left, right), (low, high)) = pyplot.subplots(2, 2, figsize=(10, 8))
    for stage, trees, marker in (("sft", "its own policy", "o"), ("sft", "training", "x")):
        nodes = [node for row in measured if (row["stage"], row["trees"], row["seed"]) == (stage, trees, 0) for node in row["nodes"]]
        left.plot([node["monte_carlo"] for node in nodes], [node["q"] for node in nodes], marker, alpha=0.5, label={"training": "V in the search", "its own policy": "outcomes only"}[trees])
    left.set(xlabel="mean outcome of 64 roll-outs", ylabel="Q of the search", title="SFT model, 200 nodes")
    left.legend()
    for stage, trees in dict.fromkeys((row["stage"], row["trees"]) for row in measured if row["trees"] == "its own policy"):
        cells = [entry for row in measured if (row["stage"], row["trees"], row["seed"]) == (stage, trees, 0) for entry in row["diagnosis"]["calibration"]]
        right.plot([cell["predicted"] for cell in cells], [cell["found"] for cell in cells], marker="o", label=stage)
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    right.set(xlabel="(V + 1) / 2", ylabel="share of correct ends", title="calibration of V")
    right.legend()
    for row in logs:
        low.plot(row["step"], row["win_reward"], label=f"{row['curves']}, winners")
        low.plot(row["step"], row["lose_reward"], linestyle="--", color=low.lines[-1].get_color(), label=f"{row['curves']}, losers")
        high.plot(row["step"], row["policy"], label=row["curves"])
    low.set(xlabel="step", ylabel="beta (log pi - log ref) of a step", title="implicit reward")
    high.set(xlabel="step", ylabel="-log sigmoid", title="preference loss")
    low.legend(fontsize=8, loc=(0.42, 0.25))
    high.legend()
    return chart


def main():
    rows, why, path = read("results.jsonl"), read("why.jsonl"), HERE.parent / "RESULTS.md"
    tables = {name: table([row for row in rows if row["table"] == name]) for name in dict.fromkeys(row["table"] for row in rows)}
    tables |= {"why": why_tables(why)} if why else {}
    text = path.read_text()
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)
        else:
            print(f"RESULTS.md has no place for table {name}")
    path.write_text(text)
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    charts = {"objectives": lambda: draw_rows(pyplot, [row for row in rows if row["table"] == "objectives"]), "scale": lambda: draw_scale(pyplot, rows), "why": lambda: draw_why(pyplot, why)}
    for name in charts.keys() & tables.keys():
        chart = charts[name]()
        chart.tight_layout()
        chart.savefig(HERE / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
