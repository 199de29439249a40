"""How well a model judges the steps of searched trees: figures by depth, calibration, AUC."""
import numpy as np

from svpo import Tree, outcomes_below, sibling_pairs


def diagnose(trees: list[Tree], judged: list[Tree]) -> dict:
    """How well a model judges the steps of searched trees; `judged` are the same trees, rescored with it.

    By depth: pairs a tree, and the share of all pairs whose better sibling scores higher by V, by the implicit reward
    log pi - log ref, with the policy that grew the trees as reference, and by the mean token log-probability; gaps under
    0.001 are ties and count half. Pooled over the steps of all trees: calibration of (V + 1) / 2 as the chance to end
    correctly, and the AUC of V, of steps that are not the last and of last ones, against the outcomes that search found.
    """
    depths, chance, value, last = {}, [], [], []
    for tree, scored in zip(trees, judged):
        depth = [0] * len(tree.nodes)
        for index, node in enumerate(tree.nodes[1:], 1):
            depth[index] = depth[node.parent] + 1
        for win, lose, _ in sibling_pairs(tree):
            w, l = scored.nodes[win], scored.nodes[lose]
            gaps = (w.value - l.value, (w.logp - tree.nodes[win].logp) - (l.logp - tree.nodes[lose].logp),
                    w.logp / max(1, sum(w.sampled)) - l.logp / max(1, sum(l.sampled)))
            depths.setdefault(depth[win], []).append([0.5 if abs(gap) < 1e-3 else float(gap > 0) for gap in gaps])
        for index, (right, wrong) in enumerate(zip(*outcomes_below(tree))):
            if index and right + wrong:
                chance.append(right / (right + wrong))
                value.append(scored.nodes[index].value)
                last.append(tree.nodes[index].reward is not None)
    value, chance, last = np.array(value), np.array(chance), np.array(last, dtype=bool)
    bins = np.clip(((value + 1) * 5).astype(int), 0, 9)
    calibration = [{"steps": int(inside.sum()), "predicted": float((value[inside].mean() + 1) / 2), "found": float(chance[inside].mean())}
                   for inside in (bins == number for number in range(10)) if inside.any()]
    return {"by_depth": [{"depth": depth, "pairs_a_tree": len(rows) / len(trees),
                          **dict(zip(("value", "implicit_reward", "mean_logp"), np.mean(rows, axis=0).tolist()))}
                         for depth, rows in sorted(depths.items())],
            "calibration": calibration, "auc_steps": soft_auc(value[~last], chance[~last]), "auc_ends": soft_auc(value[last], chance[last]),
            "calibration_error": sum(row["steps"] * abs(row["predicted"] - row["found"]) for row in calibration) / len(value)
            if len(value) else None}


def soft_auc(score: np.ndarray, chance: np.ndarray) -> float | None:
    """Probability that a right case scores above a wrong one, ties half; each case is right with weight `chance`."""
    _, place = np.unique(score, return_inverse=True)
    right, wrong = np.bincount(place, chance), np.bincount(place, 1 - chance)
    total = right.sum() * wrong.sum()
    return float((right * (wrong.cumsum() - wrong / 2)).sum() / total) if total > 0 else None
