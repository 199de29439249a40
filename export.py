"""Preference datasets: the pairs and steps of searched trees as text, for other trainers.

    python export.py --trees trees.jsonl --model FOLDER --format trl --out pairs.jsonl

Which pairs there are, svpo.py says (--objective, --pairs, --min-gap). Rows whose text a trainer
would not turn into the searched tokens again are left out (docs/guide.md).
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import (
    Question,
    StepTokenizer,
    Tree,
    check_token_ids,
    comparable,
    rank_files,
    read_rows,
    read_trees,
)
from support.files import check_output, write_lines
from support.flags import InputError, flag, parse_args, run_command
from support.hugging_face import find_folder, model_files
from svpo import OBJECTIVES, LossConfig, pairs_of


@dataclass(frozen=True)
class TextFormat:
    """How a trainer turns the texts of a row into tokens (docs/guide.md)."""

    adds_head: bool  # it adds the special tokens that begin a prompt; the text is without them
    joined: bool  # it encodes the prompt and what follows as one text, else each text alone


FORMATS = {  # the values of --format
    "trl": TextFormat(adds_head=False, joined=True),
    "trl-text": TextFormat(adds_head=True, joined=True),
    "stepwise": TextFormat(adds_head=True, joined=False),
    "llama-factory": TextFormat(adds_head=False, joined=False),
}
AS_IT_IS = "{% for turn in messages %}{{ turn.content }}{% endfor %}"  # a chat template


@dataclass(frozen=True)
class DatasetConfig:
    """What is written, of which trees."""

    trees: str = flag("", "JSONL file of trees; files of ranks beside it (FILE-RANK) are read, too")
    model: str = flag(
        "", "folder, preset or repository id whose tokenizer the trees were grown with"
    )
    format: str = flag(
        "",
        "trl: prompt, chosen and rejected as messages that DPOTrainer takes as they are; trl-text: "
        "as texts, where it adds end-of-text to steps; stepwise: steps and labels; llama-factory: "
        "its preference format",
        choices=tuple(FORMATS),
    )
    out: str = flag("", "JSONL file to write")
    prompt: str = flag(
        "", "file with the text around {question}; empty: the prompts the trees were grown under"
    )
    soft_labels: bool = flag(False, "stepwise: labels are (Q + 1) / 2, not whether Q > 0")
    keep_retokenised: bool = flag(
        False, "keep rows whose text gives other tokens than were searched, and mark all rows"
    )


@dataclass
class TreeText:
    """A tree with the text that each node adds to its path, special tokens included."""

    tree: Tree
    texts: list[str]
    tokens: list[list[int]]  # what a trainer should get of each text

    def text(self, part: list[int]) -> str:
        """The text of some nodes in a row."""
        return "".join(self.texts[index] for index in part)

    def is_exact(self, parts: list[list[int]], tokenizer: StepTokenizer, form: TextFormat) -> bool:
        """Whether a trainer gets the searched tokens again, and cut where the parts are cut."""
        texts = [self.text(part) for part in parts]
        tokens = [[token for index in part for token in self.tokens[index]] for part in parts]
        if form.joined:
            texts, tokens = itertools.accumulate(texts), list(itertools.accumulate(tokens))
        special = form.joined and form.adds_head
        encode = tokenizer.tokenizer.encode
        return [encode(text, add_special_tokens=special).ids for text in texts] == tokens


def as_text(tree: Tree, tokenizer: StepTokenizer, form: TextFormat) -> TreeText:
    """A tree as text. A step is decoded after its parent: some decoders strip a first space."""
    decode = partial(tokenizer.tokenizer.decode, skip_special_tokens=False)
    encoding = tokenizer.tokenizer.encode("a")
    head = list(itertools.compress(encoding.ids, encoding.special_tokens_mask))
    tokens = [node.tokens for node in tree.nodes]
    while head and tokens[0][: len(head)] != head:  # what the tokenizer adds behind a text
        head.pop()
    rest = tokens[0][len(head) :]
    texts = [decode(rest) if form.adds_head else decode(head) + decode(rest)]
    for node in tree.nodes[1:]:
        before = tokens[node.parent] if node.parent else rest
        start, text = decode(before), decode(before + node.tokens)
        # letters of several bytes may begin in one step and end in the next
        texts.append(text.removeprefix(start) if text.startswith(start) else decode(node.tokens))
    if form.adds_head and not form.joined:
        tokens[0] = rest
    return TreeText(tree, texts, tokens)


def preferences(known: TreeText, losses: LossConfig, name: str) -> Iterator[tuple[dict, list]]:
    """The row of each pair, and the nodes of its texts: [[prompt, chosen], [prompt, rejected]]."""
    tree = known.tree
    whole = OBJECTIVES[losses.objective].whole_solutions
    for win, lose, weight in pairs_of(tree, losses):
        prompt = [0] if whole else [0, *tree.path(tree.nodes[win].parent)]
        sides = [tree.path(end)[len(prompt) - 1 :] for end in (win, lose)]
        texts = map(known.text, [prompt, *sides])
        row = dict(zip(("prompt", "chosen", "rejected"), texts))
        if name == "trl":
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {key: [{"role": roles[key], "content": text}] for key, text in row.items()}
            row["chat_template_kwargs"] = {"chat_template": AS_IT_IS}
        if name == "llama-factory":
            row = {"instruction": row.pop("prompt"), "input": "", **row}
        q_chosen, q_rejected = (float(tree.nodes[end].q_value) for end in (win, lose))
        row |= {"q_chosen": q_chosen, "q_rejected": q_rejected, "weight": weight, "id": tree.id}
        yield row, [[prompt, side] for side in sides]


def supervision(known: TreeText, soft: bool) -> Iterator[tuple[dict, list]]:
    """The row of each path that no visited step continues, and the nodes of its texts."""
    nodes = known.tree.nodes
    visited = {index for index, node in enumerate(nodes) if index and node.visit_count}
    for end in sorted(visited - {nodes[index].parent for index in visited}):
        path = known.tree.path(end)
        values = [float(nodes[index].q_value) for index in path]
        row = {
            "prompt": known.texts[0],
            "completions": [known.texts[index] for index in path],
            "labels": [(q + 1) / 2 if soft else q > 0 for q in values],
            "q_values": values,
            "id": known.tree.id,
        }
        yield row, [[[0], *([index] for index in path)]]


def dataset_rows(
    trees: list[Tree],
    tokenizer: StepTokenizer,
    config: DatasetConfig,
    losses: LossConfig,
    counts: Counter,
) -> Iterator[dict]:
    """The rows of a dataset; `counts` counts them, and what a trainer makes of them."""
    form = FORMATS[config.format]
    end_of_text = tokenizer.tokenizer.id_to_token(tokenizer.eos_ids[0])
    for tree in trees:
        known = as_text(tree, tokenizer, form)
        if config.format == "stepwise":
            rows = list(supervision(known, config.soft_labels))
        else:
            rows = list(preferences(known, losses, config.format))
        counts["trees"] += bool(rows)
        for row, cuts in rows:
            exact = all(known.is_exact(parts, tokenizer, form) for parts in cuts)
            counts["rows"] += 1
            counts["retokenised"] += not exact
            if config.keep_retokenised:
                row["retokenised"] = not exact
            elif not exact:
                continue
            written = [tree.nodes[index] for _, *sides in cuts for side in sides for index in side]
            counts["written"] += 1
            counts["foreign"] += not all(all(node.sampled) for node in written)
            if config.format == "trl-text":
                ends = (row["chosen"].endswith(end_of_text), row["rejected"].endswith(end_of_text))
                counts["open"] += not all(ends)
            yield row


def given_trees(config: DatasetConfig, files: list[Path], tokenizer: StepTokenizer) -> list[Tree]:
    """The trees of --trees, one a question, with the prompt of --prompt if there is one.

    InputError if they are not of this tokenizer.
    """
    trees = list({tree.id: tree for file in files for tree in read_trees(file)}.values())
    check_token_ids(trees, tokenizer.vocabulary, f"--trees {config.trees}")
    if config.prompt:
        tokenizer = tokenizer.with_prompt(config.prompt)
        asked = [Question(tree.id, tree.question, tree.answer) for tree in trees]
        return [tokenizer.set_prompt(tree, question) for tree, question in zip(trees, asked)]
    prompts = [comparable(tokenizer.tokenizer.decode(tree.nodes[0].tokens)) for tree in trees]
    if trees and not any(comparable(tree.question) in text for tree, text in zip(trees, prompts)):
        raise InputError(
            f"--trees {config.trees}: no prompt holds its question, read with the tokenizer of "
            f"{config.model}: are they of another model? (--prompt FILE replaces prompts)"
        )
    return trees


def main():
    required = ("trees", "model", "format", "out")
    config, losses = parse_args(__doc__, (DatasetConfig, LossConfig), sys.argv[1:], required)
    objective = OBJECTIVES.get(losses.objective)
    if not objective or not objective.pairs:
        names = ", ".join(name for name, one in OBJECTIVES.items() if one.pairs)
        raise InputError(f"--objective {losses.objective}: the objectives with pairs are {names}")
    if config.soft_labels and config.format != "stepwise":
        raise InputError(f"--soft-labels: --format {config.format} has no labels")
    files = list(rank_files(Path(config.trees)))
    if not files:
        raise InputError(f"--trees {config.trees}: no such file")
    folder = find_folder(config.model, ("*.json",))
    out = Path(config.out)
    check_output(out, "--out", [*files, config.prompt, *model_files(folder)])
    old = next(read_rows(out, 1), (0, {}))[1] if out.exists() else {}
    if old and not old.keys() & {"q_chosen", "q_values"}:
        raise InputError(f"--out {out}: holds something else than such a dataset; name another")
    tokenizer = StepTokenizer.load(folder)
    trees = given_trees(config, files, tokenizer)
    counts = Counter()
    rows = dataset_rows(trees, tokenizer, config, losses, counts)
    first = next(rows, None)
    kind = "paths" if config.format == "stepwise" else "pairs"
    if first is None:
        raise InputError(
            f"--trees {config.trees}: nothing to write; {len(trees)} trees with {counts['rows']} "
            f"{kind}, of which {counts['retokenised']} give other tokens than were searched"
        )
    write_lines(out, itertools.chain([first], rows))
    print_counts(config, len(trees), kind, counts)


def print_counts(config: DatasetConfig, trees: int, kind: str, counts: Counter):
    """Say what was written, and what a trainer will do with it that training on trees does not."""
    share = 100 * counts["retokenised"] / counts["rows"]
    fate = "marked" if config.keep_retokenised else "left out"
    print(
        f"{trees} trees, {counts['trees']} with {kind}: {counts['rows']} {kind}, of which "
        f"{counts['retokenised']} ({share:.1f} %) give other tokens than were searched, {fate}\n"
        f"{config.out}: {counts['written']} {kind}"
    )
    if counts["open"]:
        print(
            f"{counts['open']} of them have a text without end-of-text, where DPOTrainer adds it; "
            "it adds none to those of --format trl"
        )
    if counts["foreign"] and kind == "pairs":
        print(f"{counts['foreign']} of them hold output of code, which a trainer would teach, too")


if __name__ == "__main__":
    run_command(main)
