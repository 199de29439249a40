"""Make every table and figure of RESULTS.md from experiments/results.jsonl; the text around them is left as it is.

    python experiments/results.py            needs matplotlib for the figures

A table stands in RESULTS.md between `<!-- TABLE -->` and `<!-- end -->`. Cells are means over seeds with their standard error.
"""
import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = {  # heading -> figure of a line of results.jsonl
    "greedy": lambda row: 100 * row["figures"]["greedy"],
    "majority@5": lambda row: 100 * row["figures"]["majority:5"],
    "SBS(1,5)": lambda row: 100 * row["figures"]["beam:1,5"],
    "SBS(3,5)": lambda row: 100 * row["figures"]["beam:3,5"],
    "siblings own": lambda row: row["siblings_own"],
    "siblings fixed": lambda row: row["siblings_fixed"],
    "unique tokens, millions": lambda row: row["searched_tokens"] / 1e6,
    "seconds": lambda row: row["training_seconds"],
}
PRECISION = {"siblings own": 3, "siblings fixed": 3, "unique tokens, millions": 2, "seconds": 0}


def mean(values: list[float], digits: int) -> str:
    values = [value for value in values if value is not None]
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}" if values else "-"


def table(rows: list[dict]) -> str:
    """A Markdown table: a line for each row's name, in the order in which they were measured."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in names:
        mine = [row for row in rows if row["row"] == name]
        cells = [mean([figure(row) for row in mine], PRECISION.get(heading, 1)) for heading, figure in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    commits, seeds = sorted({row["commit"] for row in rows}), sorted({row["seed"] for row in rows})
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; {rows[0]['questions']} test questions each; commit {', '.join(commits)}; "
              f"`python experiments/run.py {rows[0]['table']}`. Seconds: the round's search and training, without SFT and answering. Unique tokens: of the trees, "
              "or groups, learned from; a step that was sampled twice counts once."]
    return "\n".join(lines)


def figure(rows: list[dict], path: Path):
    """Accuracy of each row, a marker a way of answering, with standard errors over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = list(dict.fromkeys(row["row"] for row in rows))
    chart, axes = pyplot.subplots(figsize=(8, 4.5))
    for place, (strategy, heading) in enumerate((("greedy", "greedy"), ("majority:5", "majority@5"), ("beam:1,5", "SBS(1,5)"), ("beam:3,5", "SBS(3,5)"))):
        found = [[100 * row["figures"][strategy] for row in rows if row["row"] == name] for name in names]
        axes.errorbar([index + 0.12 * (place - 1.5) for index in range(len(names))], [statistics.fmean(values) for values in found],
                      [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0 for values in found], fmt="o", capsize=2, label=heading)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set(ylabel="accuracy in %", title=f"{rows[0]['questions']} test questions, mean and standard error over seeds")
    axes.legend()
    chart.tight_layout()
    chart.savefig(path, dpi=110)


def main():
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    path = HERE.parent / "RESULTS.md"
    text = path.read_text()
    for name in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == name]
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            print(f"RESULTS.md has no place for table {name}")
            continue
        text = pattern.sub(lambda match: match[1] + table(mine) + "\n" + match[2], text)
        if name == "objectives":
            figure(mine, HERE / "objectives.png")
    path.write_text(text)


if __name__ == "__main__":
    main()
