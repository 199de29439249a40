"""A forest laid out in rows: depth-first, each unique token once. Who sees whom then is `model.tree_mask`."""
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Pack:
    """A forest in depth-first order: each unique token once. Flat indices count through (B, T) row by row."""
    token_BT: Tensor
    position_BT: Tensor  # depth in tokens from the tree's own first token
    subtree_end_BT: Tensor  # where in the row the subtree of the token's node ends; padding sees only itself
    target_M: Tensor  # flat index of every sampled token
    predictor_M: Tensor  # flat index of the token before it on its path, whose hidden state predicts it
    node_M: Tensor  # which of the E nodes it belongs to
    last_E: Tensor  # flat index of each node's last token, where its value is read
    node_E: list = field(repr=False)  # the nodes, tree by tree in their stored order
    first_node: list[int] = field(repr=False)  # index in node_E of each tree's root


def flatten(tree):
    """Depth-first order: (node index, first position) pairs, and each node's subtree length in tokens."""
    children, length = [[] for _ in tree.nodes], [len(node.tokens) for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        length[tree.nodes[index].parent] += length[index]
        children[tree.nodes[index].parent].insert(0, index)
    order, stack = [], [(0, 0)]
    while stack:
        index, position = stack.pop()
        order.append((index, position))
        stack += [(child, position + len(tree.nodes[index].tokens)) for child in reversed(children[index])]
    return order, length


def parts(tree, row_tokens: int):
    """(size, depth-first order, subtree lengths) of the tree; where it is longer than a row it is cut between the root's
    children, and each part begins with the root."""
    order, length = flatten(tree)
    pieces, cut = [order[:1]], 0 < row_tokens < length[0]
    used = prefix = len(tree.nodes[0].tokens)
    for index, position in order[1:]:
        if cut and tree.nodes[index].parent == 0 and used > prefix and used + length[index] > row_tokens:
            pieces.append(order[:1])
            used = prefix
        pieces[-1].append((index, position))
        used += len(tree.nodes[index].tokens)
    sizes = [sum(len(tree.nodes[index].tokens) for index, _ in piece) for piece in pieces]
    return [(size, piece, [size, *length[1:]]) for size, piece in zip(sizes, pieces)]


def first_fit(sizes: list[int], width: int) -> list[tuple[int, int]]:
    """(row, column) of each piece in rows of `width` tokens: the largest first, each into the first row that has room."""
    free, place = [], [None] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        row = next((row for row, left in enumerate(free) if left >= sizes[index]), len(free))
        if row == len(free):
            free.append(width)
        place[index] = (row, width - free[row])
        free[row] -= sizes[index]
    return place


def pack(trees: list, row_tokens: int = 0, device="cpu") -> Pack:
    """Pack trees into rows of at most `row_tokens` tokens (first fit, largest first; 0: the largest tree's size; on CUDA, whole
    blocks of flex_attention). A longer tree is cut between the root's children, the root's tokens repeated; a part that is
    still longer lengthens the rows. Every node keeps its place in `node_E`, so losses do not depend on the packing."""
    pieces = [(index, *part) for index, tree in enumerate(trees) for part in parts(tree, row_tokens)]
    sizes, block = [size for _, size, _, _ in pieces], 128 if "cuda" in str(device) else 1
    place = first_fit(sizes, max([row_tokens, *sizes]))
    rows = 1 + max(row for row, _ in place)
    width = math.ceil(max(column + size for (_, column), size in zip(place, sizes)) / block) * block
    token = [[0] * width for _ in range(rows)]
    position = [[0] * width for _ in range(rows)]
    end = [list(range(1, width + 1)) for _ in range(rows)]
    first_node = [0, *itertools.accumulate(len(tree.nodes) for tree in trees)]
    target, predictor, owner, last = [], [], [], [0] * first_node.pop()
    for number, (tree_index, _, order, lengths) in enumerate(pieces):
        (row, column), base, tails = place[number], first_node[tree_index], {-1: None}
        for index, depth in order:
            node = trees[tree_index].nodes[index]
            count = len(node.tokens)
            token[row][column:column + count] = node.tokens
            position[row][column:column + count] = range(depth, depth + count)
            end[row][column:column + count] = [column + lengths[index]] * count
            before = tails[node.parent]
            for offset, sampled in enumerate(node.sampled):
                here = row * width + column + offset
                if sampled and before is not None:
                    target.append(here)
                    predictor.append(before)
                    owner.append(base + index)
                before = here
            tails[index] = last[base + index] = before
            column += count
    tensors = [torch.tensor(part, dtype=torch.long) for part in (token, position, end, target, predictor, owner, last)]
    return Pack(*tensors, [node for tree in trees for node in tree.nodes], first_node)
