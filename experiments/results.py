"""Make the tables of RESULTS.md and experiments/tables.md, and the figures, from what was measured.

    python experiments/results.py            needs matplotlib for the figures

The measurements are in experiments/, in results.jsonl, why.jsonl, ladder.jsonl and real.jsonl. A
table stands between `<!-- NAME -->` and `<!-- end -->`, and the text around it is kept.
experiments/tables.md gets every column; RESULTS.md gets at most five. A cell is the mean over seeds
with its standard error.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from support.tables import Table

SUMMARY = HERE.parent / "RESULTS.md"
FULL = HERE / "tables.md"

Figure = Callable[[dict], float | None]  # of one line of results.jsonl


# ---------------------------------------------------------------- columns


def accuracy(strategy: str) -> Figure:
    return lambda row: 100 * row["figures"][strategy]


def cost(strategy: str, key: str, factor: float = 1) -> Figure:
    return lambda row: factor * row["answers"][strategy][key]


def field(name: str, factor: float = 1) -> Figure:
    return lambda row: None if row[name] is None else factor * row[name]


ANSWERS = {
    "greedy": accuracy("greedy"),
    "majority@5": accuracy("majority:5"),
    "SBS(1,5)": accuracy("beam:1,5"),
    "SBS(3,5)": accuracy("beam:3,5"),
}
SIBLINGS = {"siblings own": field("siblings_own"), "siblings fixed": field("siblings_fixed")}
UNIQUE = {"unique tokens, millions": field("searched_tokens", 1e-6)}
SAMPLED = {"sampled tokens, millions": field("sampled_tokens", 1e-6)}
SECONDS = {"seconds": field("training_seconds")}
ANSWER_COST = {
    "tokens an answer, greedy": cost("greedy", "sampled_tokens"),
    "ms an answer, greedy": cost("greedy", "seconds", 1000),
    "tokens, SBS(3,5)": cost("beam:3,5", "sampled_tokens"),
    "ms, SBS(3,5)": cost("beam:3,5", "seconds", 1000),
}
SOUND = {
    "wholly sound": field("sound", 100),
    "of the right, unsound": field("right_with_wrong_steps", 100),
}
COLUMNS = {  # table -> all its columns
    "objectives": ANSWERS | SIBLINGS | UNIQUE | SECONDS,
    "ablation": ANSWERS | SIBLINGS | SAMPLED | SECONDS,
    "compute": ANSWERS | SAMPLED | SECONDS | ANSWER_COST,
    "transfer": ANSWERS | SIBLINGS | SOUND,
}
AHEAD = {"greedy - svpo's": "greedy", "SBS(3,5) - svpo's": "beam:3,5"}  # heading -> strategy
PAIRED = ["greedy", "greedy - svpo's", "SBS(3,5)", "SBS(3,5) - svpo's"]
SHORT = {  # table -> heading of the first column, the other columns in RESULTS.md
    "objectives": ("objective", PAIRED),
    "ablation": ("change to svpo", PAIRED),
    "scale": ("parameters", ["SFT, greedy", "SVPO, greedy", "gain", "SVPO, SBS(3,5)"]),
    "transfer": ("objective", ["greedy", "SBS(3,5)", "siblings fixed", "wholly sound"]),
    "compute": ("objective", ["greedy", "SBS(3,5)", "sampled tokens, millions", "seconds"]),
}
PRECISION = {  # heading -> digits; 1 where nothing is said
    "siblings own": 3,
    "siblings fixed": 3,
    "unique tokens, millions": 2,
    "sampled tokens, millions": 2,
    "seconds": 0,
}
SEARCHED = (  # of table "transfer-trees": name of the line, key, factor, digits
    ("right answers after an unsound step, %", "right_with_wrong_steps", 100, 1),
    ("mean Q of steps that are sound, as all before them are", "q_of_sound", 1, 2),
    ("mean Q of the others", "q_of_unsound", 1, 2),
    ("the others with Q > 0, %", "unsound_with_positive_q", 100, 1),
    (
        "pairs of a sound and an unsound sibling that prefer the sound one, %",
        "sound_preferred",
        100,
        1,
    ),
)
SIZES = ("28 k", "97 k", "297 k", "666 k")  # of run.py; the other tables use 297 k
JUDGES = {"V": "value", "implicit reward": "implicit_reward", "mean log-probability": "mean_logp"}

COMMANDS = {"why": "python experiments/why.py --seed N"}  # the others: python experiments/run.py
ANCHORS = {  # table -> its heading in experiments/tables.md
    "objectives": "1-objectives",
    "ablation": "2-ablation",
    "scale": "3-scale",
    "transfer": "4-transfer",
    "compute": "5-compute",
    "why": "6-why-it-works-or-fails",
    "ladder": "10-what-makes-svpo-lead",
}
NOTES = {
    "objectives": "Unique tokens are those of the trees or groups that a row learns from. "
    "A step that was sampled twice counts once.",
    "ablation": "`values without search` samples whole solutions at temperature 1; all other rows "
    "search at 0.7. Seconds are rough: two or three processes ran at once, with one thread each.",
    "scale": "The row 297 k is from table 1.",
    "transfer": "Two processes ran at once, with one thread each.",
    "compute": "Two processes ran at once, with one thread each. "
    "A third ran for two minutes during `grpo, 2 passes` of seed 0.",
}


# ---------------------------------------------------------------- tables


def read(name: str) -> list[dict]:
    path = HERE / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def mean(values: list[float | None], digits: int) -> str:
    """The mean with its standard error, as a cell of a table; None is left out."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def rows_of(table: str, rows: list[dict]) -> list[dict]:
    """The lines of results.jsonl that a table is made of."""
    if table == "scale":
        return rows_of_scale(rows)
    return [row for row in rows if row["table"] == table]


def rows_of_scale(rows: list[dict]) -> list[dict]:
    """Those of table "scale"; the size 297 k stands in table "objectives"."""
    shared = ("sft", "svpo")
    return [
        row
        for row in rows
        if row["table"] == "scale" or (row["table"] == "objectives" and row["row"] in shared)
    ]


def measured_table(table: str, rows: list[dict]) -> Table:
    """All columns of a table of run.py: a line for each row, in the order of measurement."""
    if table == "scale":
        return scale_table(rows)
    rows = rows_of(table, rows)
    columns = COLUMNS[table]
    base = {row["seed"]: row for row in rows if row["row"] == "svpo"}
    if base:
        columns = columns | {name: ahead(base, strategy) for name, strategy in AHEAD.items()}
    lines = []
    for label in dict.fromkeys(row["row"] for row in rows):
        seeds = [row for row in rows if row["row"] == label]
        line = [label]
        for heading, figure in columns.items():
            line.append(mean([figure(row) for row in seeds], PRECISION.get(heading, 1)))
        lines.append(line)
    return Table(["", *columns], lines)


def ahead(base: dict[int, dict], strategy: str) -> Figure:
    """Points ahead of the `svpo` row of the same seed, which starts from the same SFT model."""

    def points(row: dict) -> float | None:
        if row["seed"] not in base:
            return None
        return 100 * (row["figures"][strategy] - base[row["seed"]]["figures"][strategy])

    return points


def trees_table(rows: list[dict]) -> Table:
    """Soundness in the trees of table "transfer", which all rows of a seed learn from."""
    rows = rows_of("transfer", rows)
    found = [row["search"] for row in rows if row["row"] == "svpo" and "search" in row]
    lines = []
    for label, key, factor, digits in SEARCHED:
        lines.append([label, mean([factor * seed[key] for seed in found], digits)])
    return Table(["in the trees", "mean over seeds"], lines)


def scale_table(rows: list[dict]) -> Table:
    """All columns of table "scale": a line for each size."""
    found = by_size(rows)
    headings = list(next(iter(found.values()))[0])
    lines = []
    for size, seeds in found.items():
        line = [size]
        for heading in headings:
            line.append(mean([seed[heading] for seed in seeds], PRECISION.get(heading, 1)))
        lines.append(line)
    return Table(["parameters", *headings], lines)


def by_size(rows: list[dict]) -> dict[str, list[dict]]:
    """The figures of each size, one dictionary for each seed."""
    found = {}
    for size in SIZES:
        start = "" if size == "297 k" else f"{size}, "  # of the names of its rows
        table = "objectives" if size == "297 k" else "scale"
        mine = {(row["row"], row["seed"]): row for row in rows if row["table"] == table}
        for seed in sorted(seed for name, seed in mine if name == f"{start}svpo"):
            if (f"{start}sft", seed) in mine:
                pair = (mine[f"{start}sft", seed], mine[f"{start}svpo", seed])
                found.setdefault(size, []).append(gains(*pair))
    return found


def gains(before: dict, after: dict) -> dict[str, float]:
    """What one round of SVPO changes for one seed, and what beam search adds to it."""
    sft = ANSWERS["greedy"](before)
    svpo = ANSWERS["greedy"](after)
    beam = ANSWERS["SBS(3,5)"](after)
    return {
        "SFT, greedy": sft,
        "SVPO, greedy": svpo,
        "gain": svpo - sft,
        "SVPO, SBS(3,5)": beam,
        "over greedy": beam - svpo,
        "siblings fixed": after["siblings_fixed"],
    }


# ---------------------------------------------------------------- tables of why.jsonl


def by_trees(why: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The lines of each stage and kind of trees, one for each seed."""
    found = {}
    for row in why:
        if "stage" in row:
            found.setdefault((row["stage"], row["trees"]), []).append(row)
    return found


def by_depth(rows: list[dict]) -> dict[int, list[dict]]:
    """The diagnosis at each depth that all seeds reach."""
    found = {}
    for row in rows:
        for entry in row["diagnosis"]["by_depth"]:
            found.setdefault(entry["depth"], []).append(entry)
    return {depth: found[depth] for depth in sorted(found) if len(found[depth]) == len(rows)}


def judge_cells(trees: str, entries: list[dict]) -> list[str]:
    """How often each judge ranks the better step higher. On trees of its own policy a model is
    its own reference, so there is no implicit reward."""
    cells = {name: mean([entry[key] for entry in entries], 3) for name, key in JUDGES.items()}
    if trees != "the sft policy":
        cells["implicit reward"] = "-"
    return list(cells.values())


def judges_table(why: list[dict]) -> Table:
    """Pairs and judges, by depth."""
    lines = []
    for (stage, trees), rows in by_trees(why).items():
        for depth, entries in by_depth(rows).items():
            pairs = mean([entry["pairs_a_tree"] for entry in entries], 2)
            lines.append([f"{stage}, {trees}", str(depth), pairs, *judge_cells(trees, entries)])
    return Table(["model, trees of", "depth", "pairs a tree", *JUDGES], lines)


def agreements(row: dict) -> dict[str, dict | None]:
    """What was compared with 64 roll-outs."""
    return {
        "Q": row["q"],
        "Q, roll-outs within 0.9": row["undecided"],
        "Q, depth 1": row["by_depth"]["1"],
        "Q, depth 2": row["by_depth"]["2"],
        "V": row["v"],
    }


def roll_outs_table(why: list[dict]) -> Table:
    """Agreement with roll-outs, and calibration, wherever all seeds have it."""
    lines = []
    for (stage, trees), rows in by_trees(why).items():
        compared = [agreements(row) for row in rows if "q" in row]
        calibration = [row["diagnosis"]["calibration_error"] for row in rows]
        for label in compared[0] if compared else ():
            found = [seed[label] for seed in compared]
            if not all(found):
                continue
            line = [f"{stage}, {trees}", label]
            for name in ("correlation", "error", "same_sign"):
                line.append(mean([seed[name] for seed in found], 3))
            lines.append([*line, mean(calibration, 3) if label == "V" else ""])
    names = ["correlation", "mean absolute error", "same sign", "calibration error"]
    return Table(["model, trees of", "against 64 roll-outs", *names], lines)


def why_summary(why: list[dict]) -> Table:
    """Judges on pairs of the SFT policy, and Q against roll-outs on trees of the own policy."""
    found = by_trees(why)
    lines = []
    for stage in dict.fromkeys(stage for stage, _ in found):
        own = found[stage, "its own policy"]
        trees = "its own policy" if stage == "sft" else "the sft policy"
        entries = by_depth(found[stage, trees])
        for depth in (1, 2):
            correlations = [row["by_depth"][str(depth)]["correlation"] for row in own]
            label = f"{stage}, depth {depth}"
            lines.append([label, *judge_cells(trees, entries[depth]), mean(correlations, 3)])
    return Table(["model, depth", *JUDGES, "Q and roll-outs"], lines)


# ---------------------------------------------------------------- tables of ladder.jsonl

PARTS = ("test", "valid")
LADDER_SHORT = (  # rows of RESULTS.md
    "svpo",
    "rft",
    "alphamath",
    "grpo",
    "tree-grpo",
    "dvo",
    "value losses 0.1",
    "value detached",
    "labels without V",
    "targets halved",
    "search without V",
    "all correct",
    "all correct, value losses 0.1",
    "all correct, value losses 0.1, fitted",
    "search without V, all correct, value losses 0.1",
    "no preference",
    "pairs by a prover",
    "the most confident wrong leaf",
)
LADDER = {  # heading -> figure of a line of ladder.jsonl
    "greedy": lambda row: 100 * row["test"]["greedy"],
    "SBS(1,5)": lambda row: 100 * row["test"]["beam:1,5"],
    "SBS(3,5)": lambda row: 100 * row["test"]["beam:3,5"],
    "validation, greedy": lambda row: 100 * row["valid"]["greedy"],
    "validation, SBS(1,5)": lambda row: 100 * row["valid"]["beam:1,5"],
    "siblings fixed": field("siblings"),
}


def ladder_rows(ladder: list[dict], task: str) -> dict[str, dict[int, dict]]:
    """Row -> seed -> its line, in the order of experiments/ladder.py."""
    from experiments.ladder import ROWS  # here, because it loads torch

    lines = [line for line in ladder if line["kind"] == "row" and line["task"] == task]
    found = {}
    for name in ROWS:
        seeds = {line["seed"]: line for line in lines if line["row"] == name}
        if seeds:
            found[name] = seeds
    return found


def ladder_table(ladder: list[dict], task: str, columns: dict[str, Figure]) -> Table:
    """Columns, and the points ahead of the row `svpo` of the same seed."""
    found = ladder_rows(ladder, task)
    base = found["svpo"]
    lines = []
    for name, seeds in found.items():
        both = [(seeds[seed], base[seed]) for seed in seeds if seed in base]
        cells = [
            mean([figure(row) for row in seeds.values()], PRECISION.get(heading, 1))
            for heading, figure in columns.items()
        ]
        for heading in ("greedy", "SBS(1,5)"):
            points = [LADDER[heading](mine) - LADDER[heading](other) for mine, other in both]
            cells.append(mean(points, 1))
        lines.append([name, str(len(seeds)), *cells])
    return Table(["change", "seeds", *columns, "greedy - svpo's", "SBS(1,5) - svpo's"], lines)


def ways_table(ladder: list[dict]) -> Table:
    """Accuracy of the ways to answer, on the test and on the validation questions."""
    found = {}
    for line in ladder:
        if line["kind"] == "answers" and line["task"] == "arithmetic":
            found.setdefault((line["row"], line["way"]), []).append(line)
    lines = []
    for (name, way), seeds in found.items():
        cells = [mean([100 * seed[part]["accuracy"] for seed in seeds], 1) for part in PARTS]
        tokens = mean([seed["test"]["sampled_tokens"] for seed in seeds], 0)
        lines.append([name, way, str(len(seeds)), *cells, tokens])
    return Table(["model", "way", "seeds", *PARTS, "tokens an answer"], lines)


def cosines_table(ladder: list[dict]) -> Table:
    """Cosines of the gradients of two objectives, for the policy that grew the trees and later."""
    found = {}
    for line in ladder:
        if line["kind"] == "gradients" and line["task"] == "arithmetic":
            for pair, cosine in line["cosines"].items():
                found.setdefault(pair, {}).setdefault(line["model"], []).append(cosine)
    models = {"sft": "SFT", "svpo": "after a round of svpo"}
    lines = [
        [pair, *(mean(cosines.get(model, []), 2) for model in models)]
        for pair, cosines in found.items()
    ]
    return Table(["gradients of", *models.values()], lines)


# ---------------------------------------------------------------- blocks of Markdown


def listed(words: list) -> str:
    """1, 2 and 3."""
    words = [str(word) for word in words]
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def source(table: str, rows: list[dict]) -> str:
    """The seeds, questions, commits and command of a table."""
    parts = ["Seeds " + listed(sorted({row["seed"] for row in rows}))]
    if "questions" in rows[0]:
        parts.append(f"{rows[0]['questions']} test questions")
    parts.append(commits_of(rows))
    parts.append(f"`{COMMANDS.get(table, f'python experiments/run.py {table}')}`")
    return "; ".join(parts)


def commits_of(rows: list[dict]) -> str:
    commits = sorted({row["commit"] for row in rows})
    return ("commits " if commits[1:] else "commit ") + listed(commits)


def notes(table: str, seconds: bool) -> str:
    """Sentences on how a table was measured."""
    covered = "Seconds cover search and training, not SFT and answering." if seconds else ""
    return " ".join(filter(None, [covered, NOTES.get(table, "")]))


def full_blocks(
    rows: list[dict], why: list[dict], real: list[dict], ladder: list[dict]
) -> dict[str, str]:
    """The tables of experiments/tables.md, by the names of their marks."""
    blocks = real_blocks(real)[1]
    for table in SHORT:
        more = notes(table, "seconds" in COLUMNS.get(table, ()))
        text = f"{source(table, rows_of(table, rows))}. {more}"
        blocks[table] = measured_table(table, rows).markdown() + "\n\n" + text
    blocks["transfer-trees"] = trees_table(rows).markdown()
    end = "\n\n" + source("why", [row for row in why if "stage" in row]) + "."
    blocks["why-judges"] = judges_table(why).markdown() + end
    blocks["why-roll-outs"] = roll_outs_table(why).markdown() + end
    commits = "\n\n" + commits_of([line for line in ladder if line["kind"] == "row"]) + "."
    blocks["ladder"] = ladder_table(ladder, "arithmetic", LADDER).markdown() + commits
    sound = {heading: LADDER[heading] for heading in ("greedy", "SBS(1,5)", "siblings fixed")}
    sound["wholly sound"] = field("sound", 100)
    blocks["ladder-deduction"] = ladder_table(ladder, "deduction", sound).markdown()
    for name, table in (("answers", ways_table(ladder)), ("gradients", cosines_table(ladder))):
        if table.lines:
            blocks[f"ladder-{name}"] = table.markdown()
    return blocks


def real_blocks(real: list[dict]) -> tuple[dict[str, str], dict[str, str]]:
    """The tables of experiments/real.py: of RESULTS.md, and of experiments/tables.md."""
    from experiments.real import blocks  # here, because it loads the tokenizer

    return blocks(real) if real else ({}, {})


def short_blocks(
    rows: list[dict], why: list[dict], real: list[dict], ladder: list[dict]
) -> dict[str, str]:
    """The tables of RESULTS.md, by the names of their marks."""
    blocks = real_blocks(real)[0]
    for table, (first, headings) in SHORT.items():
        content = measured_table(table, rows).select(first, headings).markdown()
        text = f"{source(table, rows_of(table, rows))}; {link(table)}."
        if "seconds" in headings:
            text += " " + notes(table, True)
        blocks[table] = content + "\n\n" + text
    text = f"{source('why', [row for row in why if 'stage' in row])}; {link('why')}."
    blocks["why"] = why_summary(why).markdown() + "\n\n" + text
    columns = {heading: LADDER[heading] for heading in ("greedy", "SBS(1,5)")}
    table = ladder_table(ladder, "arithmetic", columns)
    table.lines = [line for line in table.lines if line[0] in LADDER_SHORT]
    headings = ["greedy", "greedy - svpo's", "SBS(1,5)", "SBS(1,5) - svpo's"]
    text = f"{commits_of(ladder)}; `python experiments/ladder.py`; {link('ladder')}."
    blocks["ladder"] = table.select("change", headings).markdown() + "\n\n" + text
    return blocks


def link(table: str) -> str:
    return f"[full table](experiments/tables.md#{ANCHORS[table]})"


def fill(text: str, name: str, content: str) -> str:
    """The text with the content between the marks of that name."""
    begin = f"<!-- {name} -->\n"
    if text.count(begin) != 1:
        raise ValueError(f"the text has {text.count(begin)} marks <!-- {name} -->, not 1")
    before, after = text.split(begin)
    end = after.index("<!-- end -->")
    return before + begin + content + "\n" + after[end:]


def write(path: Path, blocks: dict[str, str]):
    text = path.read_text()
    for name, content in blocks.items():
        text = fill(text, name, content)
    path.write_text(text)


# ---------------------------------------------------------------- figures


def errorbars(axes, places: list[float], groups: list[list[float]], label: str, **style):
    """Means with standard errors."""
    means = [statistics.fmean(values) for values in groups]
    errors = [standard_error(values) for values in groups]
    axes.errorbar(places, means, errors, capsize=2, label=label, **style)


def draw_rows(pyplot, rows: list[dict]):
    """Accuracy of each row, one marker for each way of answering."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    chart, axes = pyplot.subplots(figsize=(8, 4.5))
    for place, (heading, figure) in enumerate(ANSWERS.items()):
        places = [index + 0.12 * (place - 1.5) for index in range(len(names))]
        groups = [[figure(row) for row in rows if row["row"] == name] for name in names]
        errorbars(axes, places, groups, heading, fmt="o")
    axes.set_xticks(range(len(names)), names, rotation=20)
    title = f"{rows[0]['questions']} test questions, mean and standard error over seeds"
    axes.set(ylabel="accuracy in %", title=title)
    axes.legend()
    return chart


def draw_scale(pyplot, rows: list[dict]):
    """Accuracy and gains against size."""
    from run import count_parameters  # here, because it loads torch

    found = by_size(rows)
    sizes = [count_parameters(size) for size in found]
    chart, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4))
    for heading in ("SFT, greedy", "SVPO, greedy", "SVPO, SBS(3,5)"):
        groups = [[seed[heading] for seed in seeds] for seeds in found.values()]
        errorbars(left, sizes, groups, heading, marker="o")
    left.set(ylabel="accuracy in %")
    differences = {
        "gain": "SVPO over SFT, both greedy",
        "over greedy": "SBS(3,5) over greedy, both SVPO",
    }
    for heading, label in differences.items():
        groups = [[seed[heading] for seed in seeds] for seeds in found.values()]
        errorbars(right, sizes, groups, label, marker="o")
    right.set(ylabel="points")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="parameters, log scale")
        axes.set_xticks(sizes, list(found))
        axes.minorticks_off()
        axes.legend()
    right.axhline(0, color="grey", linewidth=0.8)
    return chart


def draw_why(pyplot, why: list[dict]):
    """Q, V and the preference loss of runs that end well or badly, all of seed 0."""
    first = [row for row in why if row["seed"] == 0]
    chart, ((left, right), (low, high)) = pyplot.subplots(2, 2, figsize=(10, 8))
    draw_agreement(left, by_trees(first))
    draw_calibration(right, by_trees(first))
    draw_losses(low, high, [row for row in first if "curves" in row])
    return chart


def draw_agreement(axes, found: dict[tuple[str, str], list[dict]]):
    """Q against roll-outs."""
    kinds = (("its own policy", "o", "outcomes only"), ("training", "x", "V in the search"))
    for trees, marker, label in kinds:
        nodes = [node for row in found.get(("sft", trees), []) for node in row["nodes"]]
        places = [node["monte_carlo"] for node in nodes]
        axes.plot(places, [node["q"] for node in nodes], marker, alpha=0.5, label=label)
    axes.set(xlabel="mean outcome of 64 roll-outs", ylabel="Q of the search")
    axes.set(title="SFT model, 200 nodes")
    axes.legend()


def draw_calibration(axes, found: dict[tuple[str, str], list[dict]]):
    """Predicted against found shares of correct ends, on trees of each model's own policy."""
    for (stage, trees), rows in found.items():
        if trees != "its own policy":
            continue
        cells = [cell for row in rows for cell in row["diagnosis"]["calibration"]]
        places = [cell["predicted"] for cell in cells]
        axes.plot(places, [cell["found"] for cell in cells], marker="o", label=stage)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.set(xlabel="(V + 1) / 2", ylabel="share of correct ends", title="calibration of V")
    axes.legend()


def draw_losses(low, high, logs: list[dict]):
    """Implicit rewards of winners and losers, and the preference loss, step by step."""
    for row in logs:
        low.plot(row["step"], row["win_reward"], label=f"{row['curves']}, winners")
        color = low.lines[-1].get_color()
        label = f"{row['curves']}, losers"
        low.plot(row["step"], row["lose_reward"], linestyle="--", color=color, label=label)
        high.plot(row["step"], row["policy"], label=row["curves"])
    low.set(xlabel="step", ylabel="beta (log pi - log ref) of a step", title="implicit reward")
    high.set(xlabel="step", ylabel="-log sigmoid", title="preference loss")
    low.legend(fontsize=8, loc=(0.42, 0.25))
    high.legend()


def draw(rows: list[dict], why: list[dict]):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    charts = {
        "objectives": draw_rows(pyplot, rows_of("objectives", rows)),
        "scale": draw_scale(pyplot, rows),
        "why": draw_why(pyplot, why),
    }
    for name, chart in charts.items():
        chart.tight_layout()
        chart.savefig(HERE / f"{name}.png", dpi=110)


def main():
    measured = [read(f"{name}.jsonl") for name in ("results", "why", "real", "ladder")]
    write(SUMMARY, short_blocks(*measured))
    write(FULL, full_blocks(*measured))
    draw(*measured[:2])


if __name__ == "__main__":
    main()
