"""What the commands print and draw beside their tables; figures where matplotlib is present."""
import random
import unicodedata
from pathlib import Path

from data import StepTokenizer
from svpo import Tree, path, sibling_pairs


def visible(text: str) -> str:
    """A text for the terminal: what would steer it, control characters and marks of direction, is shown as its number."""
    return "".join(letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf") else f"\\x{ord(letter):02x}" for letter in text)


def describe(trees: list[Tree], tokenizer: StepTokenizer):
    """Print what a search found, and one tree's best pair of siblings as an example."""
    outcomes = [[node.reward for node in tree.nodes if node.reward is not None] for tree in trees]
    pairs = [sibling_pairs(tree) for tree in trees]
    count = len(trees)
    print(f"{count} trees: {100 * sum(1 in found for found in outcomes) / count:.1f} % with a correct solution, "
          f"{sum(map(len, outcomes)) / count:.1f} finished solutions, {sum(map(len, pairs)) / count:.1f} pairs and "
          f"{sum(tree.simulations for tree in trees) / count:.1f} effective simulations a tree")
    if not any(pairs):
        print("no siblings differ in Q: preferences and margin have nothing to learn from, and this round trains the other terms alone")
    tree, found = max(zip(trees, pairs), key=lambda item: (bool(item[1]), len(item[0].nodes)))
    two = max(found, key=lambda pair: tree.nodes[pair[0]].q_value - tree.nodes[pair[1]].q_value)[:2] if found else range(1, len(tree.nodes))[:2]
    print(f"   question  {visible(tree.question)}")
    for label, index in [("step", index) for index in (path(tree, two[0])[:-1] if two else [])] + list(zip(
            (" +  sibling", " -  sibling") if found else ("    sibling",) * 2, two)):
        node = tree.nodes[index]
        numbers = f"   (N {node.visit_count}, Q {node.q_value:+.2f}, V {node.value:+.2f})" if "sibling" in label else ""
        print(f"{label:>11}  {visible(tokenizer.tokenizer.decode(node.tokens).strip())}{numbers}", flush=True)


def print_audit(answers: list[dict], count: int):
    """How each strategy's answers were graded, and `count` of them, drawn at random, for a person to read."""
    for row in answers:
        print(f"\n{row['strategy']}, graded by: " + ", ".join(
            f"{stage} {sum(found)} right {len(found) - sum(found)} wrong" for stage in ("text", "number", "algebra", "none")
            if (found := [answer["correct"] for answer in row["answers"] if answer["graded_by"] == stage])))
        for answer in random.Random(0).sample(row["answers"], min(count, len(row["answers"]))):
            verdict = "right" if answer["correct"] else "wrong" if answer["answer"] is not None else "no answer found"
            print(f"--- {answer['id']}: {verdict} by {answer['graded_by']}; stated {answer['answer']!r}, right is {answer['reference']!r}\n"
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
    for kind in dict.fromkeys(row["strategy"].partition(":")[0] for row in answers):
        rows = sorted((row for row in answers if row["strategy"].partition(":")[0] == kind), key=lambda row: row["sampled_tokens"])
        axes.errorbar([row["sampled_tokens"] for row in rows], [100 * row["accuracy"] for row in rows],
                      [100 * row["standard_error"] for row in rows], marker="o", capsize=2, label=kind)
    axes.set(xscale="log", xlabel="sampled tokens a question", ylabel="accuracy in %", title=f"{answers[0]['questions']} questions")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
