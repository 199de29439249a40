"""Figures, drawn where matplotlib is present."""
from pathlib import Path


def draw_budget(answers: list[dict], path: Path):
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
    figure.savefig(path)
