"""Searched trees as one HTML file that needs no server and no network."""
import json
from pathlib import Path

from data import StepTokenizer, read_trees
from support.files import publish, read_json
from svpo import InputError, Tree, sibling_pairs

LARGEST = 180_000  # bytes of trees on a page
LONGEST = 600  # letters of a step, or question, that are shown


def find_tokenizer(trees: Path, model: str) -> StepTokenizer:
    """Of the model that grew the trees: named, beside them in a run folder, or in the configuration that a search keeps."""
    kept = trees.with_name(trees.name + ".config")
    folders = [model] if model else [trees.parent] + ([read_json(kept).get("SourceConfig", {}).get("model", "")] if kept.exists() else [])
    for folder in filter(None, folders):
        if (Path(folder) / "tokenizer.json").exists():
            return StepTokenizer.load(folder)
    raise InputError(f"{trees}: the model that grew these trees is not beside them; name its folder with --model")


def preferred(tree: Tree) -> list[int]:
    """The nodes that a beam of one takes in the tree as it is: from each the child with the highest V, of those that can still answer (eval.beam_search)."""
    places, node, children_of = [], 0, {}
    for index, other in enumerate(tree.nodes):
        if other.ending in (None, "answer"):
            children_of.setdefault(other.parent, []).append(index)
    while children := children_of.get(node):
        node = max(children, key=lambda index: tree.nodes[index].value)
        places.append(node)
    return places


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def to_row(tree: Tree, tokenizer: StepTokenizer, min_gap: float) -> dict:
    """What the page shows of a tree; a node is [parent, text, N, Q, V, prior, reward, ending]."""
    nodes = [[node.parent, shorten(tokenizer.tokenizer.decode(node.tokens)), node.visit_count, round(node.q_value, 2), round(node.value, 2), round(node.prior, 2), node.reward, node.ending]
             for node in tree.nodes]
    return {"question": shorten(tree.question), "answer": shorten(tree.answer), "simulations": tree.simulations, "stopped": tree.stopped, "nodes": nodes,
            "solved": any(node.reward == 1 for node in tree.nodes), "pairs": [[win, lose] for win, lose, _ in sibling_pairs(tree, min_gap=min_gap)], "path": preferred(tree)}


def write_page(trees: list[Tree], tokenizer: StepTokenizer, out: Path, min_gap: float = 0.0) -> int:
    """Write the page with as many trees as it has room for, at least one; returns their number. Text of models and questions stays text: it stands
    in JSON without any `<`, and reaches the page as textContent alone."""
    rows, size = [], 0
    for tree in trees:
        rows.append(json.dumps(to_row(tree, tokenizer, min_gap), separators=(",", ":")).replace("<", "\\u003c"))
        size += len(rows[-1])
        if size > LARGEST and len(rows) > 1:
            rows.pop()
            break
    count = f"{len(rows)} questions" if len(rows) == len(trees) else f"the first {len(rows)} of {len(trees)} questions"
    page = (Path(__file__).parent / "tree_page.html").read_text(encoding="utf-8")
    before, _, after = page.replace("DATA_COUNT", json.dumps(count)).partition(">DATA<")
    publish(out, lambda aside: aside.write_text(f"{before}>[{','.join(rows)}]<{after}", encoding="utf-8"))
    return len(rows)


def show_trees(path: Path, model: str) -> str:
    """Draw the trees of a file as a page beside it; what there is to say of it."""
    trees, out = read_trees(path), path.with_suffix(".html")
    if not trees:
        raise InputError(f"{path}: there are no trees in it")
    return f"{out}: {write_page(trees, find_tokenizer(path, model), out)} of {len(trees)} trees"
