"""The tables that the commands print. They are made of plain dicts, as they stand in JSON files."""

import random
from dataclasses import dataclass
from types import NoneType

from support.flags import visible

# what eval.json and eval.py --json must hold for the tables and figures (files.misfit)
ANSWER = {"strategy": str, "questions": int, "accuracy": float, "standard_error": float}
ANSWERS = {"answers": [{**ANSWER, "sampled_tokens": float}]}
RANKED = ({"accuracy": (float, NoneType), "standard_error": (float, NoneType)}, NoneType)
STAGE = {**ANSWERS, "stage": str, "siblings": RANKED, "siblings_fixed": RANKED}


@dataclass
class Table:
    """A Markdown table. The first cell of a line names it."""

    headings: list[str]
    lines: list[list[str]]

    def select(self, first: str, headings: list[str]) -> "Table":
        """The names of the lines under the heading `first`, and the columns with these headings."""
        places = [0, *(self.headings.index(heading) for heading in headings)]
        return Table([first, *headings], [[line[place] for place in places] for line in self.lines])

    def markdown(self) -> str:
        rule = "|---" * len(self.headings) + "|"
        lines = ["| " + " | ".join(line) + " |" for line in [self.headings, *self.lines]]
        return "\n".join([lines[0], rule, *lines[1:]])


def percent(row: dict, digits: int = 1) -> str:
    """Accuracy in % with its standard error."""
    accuracy = 100 * row["accuracy"]
    error = 100 * row["standard_error"]
    return f"{accuracy:.{digits}f} +- {error:.{digits}f}"


def judged(row: dict | None) -> str:
    """A sibling accuracy with its standard error; "-" for what could not be measured."""
    cells = [row.get("accuracy"), row.get("standard_error")] if row else [None]
    return " +- ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)


def rewarded(row: dict) -> str:
    """The mean of what --reward gives the answers, with its standard error."""
    return f"{row['reward']:.2f} +- {row['reward_error']:.2f}"


def strategy_title(name: str) -> str:
    """A strategy as it is called in tables: SBS(3,5) for beam:3,5."""
    return f"SBS({name[5:]})" if name.startswith("beam:") else name


def print_stages(rows: list[dict], title: str):
    """One line for each stage: the accuracy of each strategy, then how well V ranks siblings.

    Siblings are those of trees of the stage's own policy, and of the first stage's (fixed).
    """
    names = [strategy_title(answer["strategy"]) for answer in rows[0]["answers"]]
    columns = {"siblings": "siblings own", "siblings_fixed": "siblings fixed"}
    columns = {key: name for key, name in columns.items() if rows[0].get(key)}
    print(f"\n{title}")
    header = "".join(f"{name:>14}" for name in names)
    print(f"{'stage':10}{header}" + "".join(f"{name:>16}" for name in columns.values()))
    for row in rows:
        cells = "".join(f"{percent(answer):>14}" for answer in row["answers"])
        cells += "".join(f"{judged(row.get(key)):>16}" for key in columns)
        print(f"{row['stage']:10}{cells}", flush=True)
        if "reward" in row["answers"][0]:
            print("  reward  " + "".join(f"{rewarded(answer):>14}" for answer in row["answers"]))


def print_answers(answers: list[dict]):
    """One line for each strategy: its accuracy and what a question costs."""
    extra = f"{'mean reward':>17}" if "reward" in answers[0] else ""
    print(
        f"{'strategy':14}{'accuracy %':>14}{'stated %':>10}{'sampled':>9}{'fed':>8}{'steps':>7}"
        f"{'seconds':>9}   a question{extra}"
    )
    for row in answers:
        print(
            f"{row['strategy']:14}{percent(row):>14}{100 * row['stated']:>10.1f}"
            f"{row['sampled_tokens']:>9.0f}{row['fed_tokens']:>8.0f}{row['steps']:>7.1f}"
            f"{row['seconds']:>9.4f}"
            f"{f'{rewarded(row):>30}' if extra else ''}"
        )


def print_audit(answers: list[dict], count: int):
    """How each strategy's answers were graded, and `count` of them at random for a person."""
    for row in answers:
        counts = []
        for stage in ("text", "number", "algebra", "none"):
            found = [answer["correct"] for answer in row["answers"] if answer["graded_by"] == stage]
            if found:
                counts.append(f"{stage} {sum(found)} right {len(found) - sum(found)} wrong")
        print(f"\n{row['strategy']}, graded by: {', '.join(counts)}")
        for answer in random.Random(0).sample(row["answers"], min(count, len(row["answers"]))):
            verdict = "right" if answer["correct"] else "wrong"
            verdict = "no answer found" if answer["answer"] is None else verdict
            print(
                f"--- {visible(answer['id'])}: {verdict} by {answer['graded_by']}; "
                f"stated {answer['answer']!r}, right is {answer['reference']!r}\n"
                f"{visible(answer['text'].strip()[-400:])}"
            )


def print_first_errors(found: dict, note: str = ""):
    """How well V finds the first wrong step of solutions (eval.first_errors)."""

    def share(row):
        return f"{percent(row)} % of {row['solutions']}" if row["solutions"] else "- of 0"

    f1 = "-" if found["f1"] is None else f"{100 * found['f1']:.1f}"
    print(
        f"threshold {found['threshold']:.8g}: F1 {f1}, right on {share(found['erroneous'])} "
        f"solutions with a wrong step and on {share(found['correct'])} without{note}"
    )


def print_diagnosis(found: dict):
    """How well V judges steps, by depth, with its AUC and calibration (eval.diagnose)."""
    print(f"\n{'depth':>5}{'pairs a tree':>14}{'value':>8}{'reward':>8}{'mean logp':>11}", end="")
    print("   share of pairs ranked right")
    for row in found["by_depth"]:
        print(
            f"{row['depth']:5}{row['pairs_a_tree']:14.2f}{row['value']:8.3f}"
            f"{row['implicit_reward']:8.3f}{row['mean_logp']:11.3f}"
        )
    figures = [found["auc_steps"], found["auc_ends"], found["calibration_error"]]
    steps, ends, error = ("-" if value is None else f"{value:.3f}" for value in figures)
    print(f"AUC of V {steps} for steps before the last, {ends} for last ones; ", end="")
    print(f"expected calibration error {error}")
    bins = [f"{r['predicted']:.2f} {r['found']:.2f} {r['steps']}" for r in found["calibration"]]
    print("V as chance, found chance, steps: " + ", ".join(bins))
