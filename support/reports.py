"""What the commands print and draw beside their tables; figures where matplotlib is present."""
import json
import os
import random
import sys
import time
from pathlib import Path

from tqdm import tqdm

from data import StepTokenizer
from support.files import append
from support.flags import visible
from svpo import LossConfig, Tree, path, sibling_pairs


class Lines:
    """Where progress goes when nobody watches: a line now and then in place of a bar."""
    def write(self, text: str):
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(items, label: str, total: int, unit: str, first: int = 0) -> tqdm:
    """A bar on a terminal, else a line every half minute; only rank 0 shows one."""
    terminal = sys.stderr.isatty()
    plain = {} if terminal else {"file": Lines(), "delay": 5, "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"}
    return tqdm(items, label, total, initial=first, unit=unit, mininterval=1.0 if terminal else 30.0, maxinterval=30.0, dynamic_ncols=terminal,
                disable=int(os.environ.get("RANK", 0)) > 0, **plain)


def show_pace(bar: tqdm, driver, root, seconds: float):
    """Beside the bar of a driver whose search below `root` has ended: nodes and tokens a second, and the share of solved questions where outcomes are known."""
    nodes = [root]
    for node in nodes:
        nodes += node.children
    rewards = [node.reward for node in nodes if node.reward is not None]
    driver.graded, driver.solved = driver.graded + bool(rewards), driver.solved + (1 in rewards)
    solved = f", {100 * driver.solved / driver.graded:.0f} % solved" if driver.graded else ""
    bar.set_postfix_str(f"{driver.steps / seconds:.0f} nodes/s, {driver.sampled_tokens / seconds:.0f} tokens/s{solved}", refresh=False)


def watched(driver, ends, label: str, total: int):
    """The ends of a driver's searches as they come, with a bar."""
    begin = time.perf_counter()
    with progress(ends, label, total, "question") as bar:
        for end in bar:
            show_pace(bar, driver, end[1], time.perf_counter() - begin)
            yield end


def open_board(run: Path):
    """TensorBoard's writer, into a folder of the run."""
    from torch.utils.tensorboard import SummaryWriter  # takes the optional package
    return SummaryWriter(str(run / "tensorboard"))


def log_step(bar: tqdm, board, stage: Path, step: int, figures: dict[str, float]):
    """A line of log.jsonl, written by rank 0, the same for TensorBoard where it is asked for, and the figures to watch beside the bar."""
    line = {"stage": stage.name, "step": step, **{name: float(f"{value:.9g}") for name, value in figures.items()}}
    if not bar.disable:
        append(stage.parent / "log.jsonl", json.dumps(line) + "\n")
    for name, value in figures.items() if board else ():
        board.add_scalar(f"{stage.name}/{name}", value, step)
    shown = ("loss", "policy", "reward_accuracy", "mse", "value_accuracy")
    bar.set_postfix_str(", ".join([f"{name} {figures[name]:.3f}" for name in shown if name in figures]
                                  + [f"{figures['unique_tokens_s']:.0f} tokens/s"]), refresh=False)


def describe(trees: list[Tree], tokenizer: StepTokenizer, losses: LossConfig):
    """Print what a search found, and one tree's best pair of siblings as an example."""
    outcomes = [[node.reward for node in tree.nodes if node.reward is not None] for tree in trees]
    pairs = [sibling_pairs(tree, losses.pairs, losses.min_gap) for tree in trees]
    count = len(trees)
    print(f"{count} trees: {100 * sum(1 in found for found in outcomes) / count:.1f} % with a correct solution, "
          f"{sum(map(len, outcomes)) / count:.1f} finished solutions, {sum(map(len, pairs)) / count:.1f} pairs and "
          f"{sum(tree.simulations for tree in trees) / count:.1f} effective simulations a tree")
    if not any(pairs):
        print("no siblings qualify as a pair: preferences and margin have nothing to learn from, and this round trains the other terms alone")
    tree, found = max(zip(trees, pairs), key=lambda item: (bool(item[1]), len(item[0].nodes)))
    two = max(found, key=lambda pair: tree.nodes[pair[0]].q_value - tree.nodes[pair[1]].q_value)[:2] if found else range(1, len(tree.nodes))[:2]
    print(f"   question  {visible(tree.question)}")
    for label, index in [("step", index) for index in (path(tree, two[0])[:-1] if two else [])] + list(zip(
            (" +  sibling", " -  sibling") if found else ("    sibling",) * 2, two)):
        node = tree.nodes[index]
        numbers = f"   (N {node.visit_count}, Q {node.q_value:+.2f}, V {node.value:+.2f})" if "sibling" in label else ""
        print(f"{label:>11}  {visible(tokenizer.tokenizer.decode(node.tokens).strip())}{numbers}", flush=True)


def warn_saturated(stage: str, trees: list[Tree]):
    """Say that V is at its bounds."""
    ends = [abs(node.value) > 0.999 for tree in trees for node in tree.nodes[1:]]
    if sum(ends) > 0.9 * len(ends):
        print(f"{stage}: V is at +-1 for {sum(ends)} of {len(ends)} steps, where tanh passes no gradient; try a lower --tune-lr")


def print_table(rows: list[dict], title: str):
    """One line a stage: accuracy in % with its standard error for each strategy, then value sibling accuracy on
    trees of the stage's own policy and on the fixed trees of the first stage."""
    strategies = [answer["strategy"] for answer in rows[0]["answers"]]
    names = [f"SBS({name[5:]})" if name.startswith("beam:") else name for name in strategies]
    kinds = [(key, name) for key, name in (("siblings", "siblings own"), ("siblings_fixed", "siblings fixed")) if key in rows[0]]
    print(f"\n{title}\n{'stage':10}" + "".join(f"{name:>14}" for name in names) + "".join(f"{name:>16}" for _, name in kinds))
    for row in rows:
        cells = [f"{100 * answer['accuracy']:.1f} +- {100 * answer['standard_error']:.1f}" for answer in row["answers"]]
        measured = [" +- ".join("-" if row[key][name] is None else f"{row[key][name]:.3f}" for name in ("accuracy", "standard_error"))
                    for key, _ in kinds]
        print(f"{row['stage']:10}" + "".join(f"{cell:>14}" for cell in cells) + "".join(f"{cell:>16}" for cell in measured), flush=True)


def print_answers(answers: list[dict]):
    """One line a strategy: accuracy and what a question cost."""
    print(f"{'strategy':14}{'accuracy %':>14}{'stated %':>10}{'sampled':>9}{'fed':>8}{'steps':>7}{'seconds':>9}   a question")
    for row in answers:
        cell = f"{100 * row['accuracy']:.1f} +- {100 * row['standard_error']:.1f}"
        print(f"{row['strategy']:14}{cell:>14}{100 * row['stated']:>10.1f}{row['sampled_tokens']:>9.0f}{row['fed_tokens']:>8.0f}"
              f"{row['steps']:>7.1f}{row['seconds']:>9.4f}")


def print_audit(answers: list[dict], count: int):
    """How each strategy's answers were graded, and `count` of them, drawn at random, for a person to read."""
    for row in answers:
        print(f"\n{row['strategy']}, graded by: " + ", ".join(
            f"{stage} {sum(found)} right {len(found) - sum(found)} wrong" for stage in ("text", "number", "algebra", "none")
            if (found := [answer["correct"] for answer in row["answers"] if answer["graded_by"] == stage])))
        for answer in random.Random(0).sample(row["answers"], min(count, len(row["answers"]))):
            verdict = "right" if answer["correct"] else "wrong" if answer["answer"] is not None else "no answer found"
            print(f"--- {visible(answer['id'])}: {verdict} by {answer['graded_by']}; stated {answer['answer']!r}, right is {answer['reference']!r}\n"
                  f"{visible(answer['text'].strip()[-400:])}")


def print_diagnosis(found: dict):
    print(f"\n{'depth':>5}{'pairs a tree':>14}{'value':>8}{'reward':>8}{'mean logp':>11}   share of pairs ranked right")
    for row in found["by_depth"]:
        print(f"{row['depth']:5}{row['pairs_a_tree']:14.2f}{row['value']:8.3f}{row['implicit_reward']:8.3f}{row['mean_logp']:11.3f}")
    figures = ["-" if found[key] is None else f"{found[key]:.3f}" for key in ("auc_steps", "auc_ends", "calibration_error")]
    print("AUC of V {} for steps before the last, {} for last ones; expected calibration error {}".format(*figures))
    print("V as chance, found chance, steps: " + ", ".join(f"{row['predicted']:.2f} {row['found']:.2f} {row['steps']}"
                                                           for row in found["calibration"]))


def draw_budget(answers: list[dict], file: Path):
    """Accuracy against sampled tokens a question, one line a kind of strategy."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: the curve is not drawn")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    plot_budget(axes, answers)
    axes.set(title=f"{answers[0]['questions']} questions")
    figure.tight_layout()
    figure.savefig(file)


def plot_budget(axes, answers: list[dict]):
    """The curve of `draw_budget`."""
    for kind in dict.fromkeys(row["strategy"].partition(":")[0] for row in answers):
        rows = sorted((row for row in answers if row["strategy"].partition(":")[0] == kind), key=lambda row: row["sampled_tokens"])
        axes.errorbar([row["sampled_tokens"] for row in rows], [100 * row["accuracy"] for row in rows],
                      [100 * row["standard_error"] for row in rows], marker="o", capsize=2, label=kind)
    axes.set(xscale="log", xlabel="sampled tokens a question", ylabel="accuracy in %")
    axes.legend()
