"""Searched trees as one HTML file that needs no server and no network."""

import json
from pathlib import Path

from support.files import publish

LARGEST = 180_000  # bytes of trees on a page
LONGEST = 600  # letters of a step, or question, that are shown


def shorten(text: str) -> str:
    """The text, cut where it is longer than the page shows."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def write_page(trees: list[dict], out: Path) -> int:
    """Write a page of as many trees as it has room for, at least one; returns their number.

    A tree has `question`, `answer`, `simulations`, `stopped`, `solved`, `pairs` (winner and loser),
    `path` (nodes) and `nodes`: [parent, text, N, Q, V, prior, reward, ending]. The text of models
    and questions stays text: it is JSON without any "<", and reaches the page as textContent.
    """
    rows = []
    size = 0
    for tree in trees:
        row = json.dumps(tree, separators=(",", ":")).replace("<", "\\u003c")
        size += len(row)
        if size > LARGEST and rows:
            break
        rows.append(row)
    whole = len(rows) == len(trees)
    count = (
        f"{len(rows)} questions" if whole else f"the first {len(rows)} of {len(trees)} questions"
    )
    page = (Path(__file__).parent / "tree_page.html").read_text(encoding="utf-8")
    before, _, after = page.replace("DATA_COUNT", json.dumps(count)).partition(">DATA<")
    text = f"{before}>[{','.join(rows)}]<{after}"
    publish(out, lambda partial: partial.write_text(text, encoding="utf-8"))
    return len(rows)
