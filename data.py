"""Questions, steps, answers, trees: everything that passes between search, training and evaluation.

A solution is a list of steps, one line each. A `Tree` holds all solutions tried for one question; a worked solution is
a tree with one branch. Trees are written as JSON lines and packed depth-first for training (`pack`).

Dimension key: B rows, T tokens, E nodes of all packed trees, M sampled tokens of all packed trees.
"""
import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers


class InputError(ValueError):
    """Bad input from the user: the commands print it as one line and end with status 2."""


def flag(default, help: str):
    """A dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help})


def parse_args(description: str, stages: tuple, argv: list[str], defaults: dict = {}, required: tuple = ()) -> tuple:
    """One flag for each field of each stage's dataclass; returns one instance a stage. `defaults` go before theirs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage in stages:
        group = parser.add_argument_group(stage.__name__, stage.__doc__)
        for item in dataclasses.fields(stage):
            kind = {"action": argparse.BooleanOptionalAction} if item.type is bool else {"type": item.type}
            if item.type is tuple:
                kind = {"nargs": "+"}
            group.add_argument("--" + item.name.replace("_", "-"), default=defaults.get(item.name, item.default),
                               required=item.name in required, help=f"{item.metadata['help']} (%(default)s)", **kind)
    values = vars(parser.parse_args(argv))
    return tuple(stage(**{item.name: values[item.name] for item in dataclasses.fields(stage)}) for stage in stages)


def run_command(main):
    """Run a command; bad input is one line on stderr and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


@dataclass
class Question:
    id: str
    text: str
    answer: str
    solution: str | None = None  # worked solution, one step a line, for SFT


# ------------------------------------------------------------------- the built-in task: order of operations
# Expressions over the whole numbers modulo 7, reduced one operation a line. There are only 147 facts to know; the teacher
# who wrote the worked solutions knows them but takes the operations in random order. Search knows only the right answers:
# that multiplication comes first has to be found out. Mistakes show in the text; modulo a prime few end right by luck.

MODULUS = 7
SPLITS = {"sft": range(0, 96), "search": range(96, 208), "valid": range(208, 224), "test": range(224, 256)}


def split_of(text: str) -> str:
    """The split that owns this question: by a hash of its text, so the splits are disjoint for every seed and size."""
    return next(name for name, owned in SPLITS.items() if hashlib.sha256(text.encode()).digest()[0] in owned)


def first_operation(parts: list) -> int:
    """Index of the operator that comes first by the rules: the leftmost `*`, else the leftmost of all."""
    return parts.index("*") if "*" in parts else 1


def reduce_by(parts: list, choose) -> list[str]:
    """The solution lines when `choose(parts)` names the index of the operator to apply at each step."""
    lines = []
    while len(parts) > 1:
        index = choose(parts)
        left, operator, right = parts[index - 1:index + 2]
        value = {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS
        parts = parts[:index - 1] + [value] + parts[index + 2:]
        rest = "".join(map(str, parts))
        lines.append(f"{left}{operator}{right}={value}" + (f" -> {rest}" if len(parts) > 1 else f" #### {rest}"))
    return lines


def arithmetic_questions(split: str, count: int, seed: int) -> list[Question]:
    """`count` different questions of a split, drawn with `seed`: expressions of four numbers."""
    rng, seen, questions = random.Random(f"{split} {seed}"), set(), []
    while len(questions) < count:
        parts = [rng.randrange(1, MODULUS)]
        for _ in range(3):
            parts += [rng.choice("+-*"), rng.randrange(1, MODULUS)]
        text = "".join(map(str, parts))
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        answer = reduce_by(parts, first_operation)[-1].split("#### ")[1]
        careless = "\n".join(reduce_by(parts, lambda left: rng.randrange(1, len(left), 2)))
        solution = careless if split == "sft" else None
        questions.append(Question(f"{split}-{seed}-{len(questions)}", text, answer, solution))
    return questions


def arithmetic_tokenizer() -> Tokenizer:
    """Whole numbers, operators and marks are single tokens."""
    words = ["<eos>", "\n", "+", "-", "*", "=", " -> ", " #### "] + [str(number) for number in range(MODULUS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+| -> | #### |[-+*=\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def load_questions(spec: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of `arithmetic[:split]` (default split: test) or of a JSONL file.

    A JSONL row has `question`, `answer` and optionally `solution` and `id`; where the answer ends with GSM8K's
    `#### N`, the text before it is the solution. Raises InputError with file and line.
    """
    if spec.split(":")[0] == "arithmetic":
        split = spec.partition(":")[2] or "test"
        if split not in SPLITS:
            raise InputError(f"{spec}: the splits of the built-in task are {', '.join(SPLITS)}")
        return arithmetic_questions(split, limit or 500, seed)
    questions, ids = [], set()
    for number, row in read_rows(Path(spec), limit):
        where = f"{spec}, line {number}"
        for key in ("question", "answer"):
            if not isinstance(row.get(key), (str, int, float)) or isinstance(row[key], bool) or not str(row[key]).strip():
                raise InputError(f"{where}: needs a non-empty {key!r} (text or number)")
        answer, solution = str(row["answer"]), row.get("solution")
        if "####" in answer:
            solution = solution or answer
            answer = extract_answer(answer) or ""
            if not answer:
                raise InputError(f"{where}: no answer after '####'")
        if solution is not None and not isinstance(solution, str):
            raise InputError(f"{where}: 'solution' must be text")
        question = Question(str(row.get("id", f"{Path(spec).stem}-{number}")), str(row["question"]).strip(), answer, solution)
        if question.id in ids:
            raise InputError(f"{where}: id {question.id!r} occurs twice")
        ids.add(question.id)
        questions.append(question)
    if not questions:
        raise InputError(f"{spec}: no questions in this file")
    return questions


def read_rows(path: Path, limit: int | None = None):
    """(line number, object) of each non-blank line of a JSONL file; the first `limit` of them."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})")
    count = 0
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled[:limit]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is wanted, not {type(row).__name__}")
        yield number, row


def read_template(path: str) -> str:
    """The prompt around {question}: the text of a file, or the question and a line break."""
    if not path:
        return "{question}\n"
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the prompt cannot be read ({error})")


# --------------------------------------------------------------------------------------------- answers

ANSWER = re.compile(r"(?:####|[Tt]he (?:final )?answer is:?)[ \t]*([^\n]*)")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?")


def extract_answer(text: str) -> str | None:
    """The text after the last `####` or "The answer is" on its line; None where no answer is stated."""
    found = ANSWER.findall(text)
    return found[-1].strip().rstrip(".") or None if found else None


def to_number(text: str) -> Fraction | None:
    """Exact value of a plain number, decimal or fraction; `$`, `%`, thousands commas and a unit behind it are ignored."""
    match = NUMBER.match(text.strip().lstrip("$").strip())
    digits = match.group().replace(",", "").replace(" ", "") if match else ""
    try:
        return Fraction(digits) if 0 < len(digits) <= 100 else None
    except (ValueError, ZeroDivisionError):
        return None


def is_correct(prediction: str | None, answer: str) -> bool:
    """Numeric answers are compared exactly (18 = 18.0 = 36/2), others as text. No prediction is never correct."""
    if prediction is None:
        return False
    left, right = to_number(prediction), to_number(answer)
    return left == right if left is not None and right is not None else prediction.strip() == answer.strip()


# --------------------------------------------------------------------------------------------- tokens

class StepTokenizer:
    """A tokenizer.json with the prompt template, end-of-text, and where steps end.

    A step ends with the token in which a line break follows some visible text, wherever in the token that falls.
    """
    def __init__(self, tokenizer: Tokenizer, eos_ids: list[int], template: str = "{question}\n"):
        if "{question}" not in template:
            raise InputError("the prompt must contain {question}")
        self.tokenizer, self.eos_ids, self.template = tokenizer, eos_ids, template
        texts = [tokenizer.decode([index], skip_special_tokens=False) for index in range(tokenizer.get_vocab_size())]
        self.breaks_line_V = torch.tensor(["\n" in text for text in texts])
        self.has_text_V = torch.tensor([bool(text.strip()) for text in texts])
        self.text_before_break_V = torch.tensor([bool(text.partition("\n")[0].strip()) for text in texts])
        self.is_eos_V = torch.tensor([index in eos_ids for index in range(len(texts))])

    @staticmethod
    def load(folder: str | Path, template: str = "{question}\n") -> "StepTokenizer":
        """Read tokenizer.json, and the end-of-text ids from config.json and generation_config.json."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{path}: no such file")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a readable tokenizer ({error})")
        eos_ids, vocabulary = set(), None
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                raw = json.loads((Path(folder) / name).read_text())
                ids = raw.get("eos_token_id")
                eos_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
                vocabulary = raw.get("vocab_size", vocabulary)
        if vocabulary is not None and tokenizer.get_vocab_size() > vocabulary:
            raise InputError(f"{path}: {tokenizer.get_vocab_size()} tokens, but the model's vocabulary has {vocabulary}")
        return StepTokenizer(tokenizer, sorted(eos_ids), template)

    def encode_prompt(self, question: str) -> list[int]:
        return self.tokenizer.encode(self.template.replace("{question}", question)).ids

    def encode_steps(self, solution: str) -> list[list[int]]:
        """One token list a line; the last step ends with end-of-text in place of the line break."""
        lines = [line + "\n" for line in solution.splitlines() if line.strip()]
        lines[-1:] = [line[:-1] for line in lines[-1:]]
        steps = [self.tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
        return steps[:-1] + [step + self.eos_ids[:1] for step in steps[-1:]]

# --------------------------------------------------------------------------------------------- trees

@dataclass
class TreeNode:
    """One step of a tree as it is stored; node 0 is the question's prompt."""
    parent: int  # index into Tree.nodes, always smaller than the node's own; -1 for the root
    tokens: list[int]
    sampled: list[bool]  # which tokens the model wrote; the others are fed and carry no loss
    logp: float = 0.0  # sum of the sampled tokens' untempered log-probabilities under the policy that grew the tree
    prior: float = 1.0  # exp(mean token log-probability)
    visit_count: int = 0
    q_value: float = 0.0
    value: float = 0.0  # the value head's V when the tree was grown
    reward: float | None = None  # +1 or -1 at terminal nodes
    ending: str | None = None  # terminal nodes: "answer", "eos", "cut" (too long) or "deep"


@dataclass
class Tree:
    id: str
    question: str
    answer: str
    nodes: list[TreeNode]
    simulations: int = 0  # effective number
    stopped: str = "simulations"  # or "exhausted", or "slots" when the cache row was full
    version: int = 1


def write_tree(file, tree: Tree):
    """Append one tree as one JSON line."""
    file.write(json.dumps(dataclasses.asdict(tree)) + "\n")
    file.flush()


def read_trees(path: str | Path) -> list[Tree]:
    """All trees of a JSONL file; InputError names the line of a malformed one."""
    trees = []
    for number, row in read_rows(Path(path)):
        try:
            tree = Tree(**{**row, "nodes": [TreeNode(**node) for node in row["nodes"]]})
            sound = tree.version == 1 and tree.nodes and all(
                -1 <= node.parent < index and (node.parent >= 0) == (index > 0) and node.tokens
                and len(node.tokens) == len(node.sampled) for index, node in enumerate(tree.nodes))
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: not a tree ({error})")
        if not sound:
            raise InputError(f"{path}, line {number}: version is not 1, or a node has no tokens or a parent behind it")
        trees.append(tree)
    return trees


def solution_tree(question: Question, tokenizer: StepTokenizer) -> Tree:
    """A worked solution as a tree with one branch."""
    prompt = tokenizer.encode_prompt(question.text)
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    for step in tokenizer.encode_steps(question.solution):
        nodes.append(TreeNode(len(nodes) - 1, step, [True] * len(step)))
    return Tree(question.id, question.text, question.answer, nodes)


# --------------------------------------------------------------------------------------------- packing

@dataclass
class Pack:
    """A forest in depth-first order: each unique token once. Flat indices count through (B, T) row by row."""
    token_BT: torch.Tensor
    position_BT: torch.Tensor  # depth in tokens from the tree's own first token
    subtree_end_BT: torch.Tensor  # where in the row the subtree of the token's node ends; padding sees only itself
    target_M: torch.Tensor  # flat index of every sampled token
    predictor_M: torch.Tensor  # flat index of the token before it on its path, whose hidden state predicts it
    node_M: torch.Tensor  # which of the E nodes it belongs to
    last_E: torch.Tensor  # flat index of each node's last token, where its value is read
    node_E: list[TreeNode] = field(repr=False)  # the nodes, tree by tree in their stored order
    first_node: list[int] = field(repr=False)  # index in node_E of each tree's root


def flatten(tree: Tree):
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


def pack(trees: list[Tree], row_tokens: int = 0) -> Pack:
    """Pack trees into rows of at most `row_tokens` tokens, or of the largest tree if that is longer (first fit,
    largest first). Every node keeps its place in `node_E`, so losses do not depend on the packing."""
    flat = [flatten(tree) for tree in trees]
    size = [length[0] for _, length in flat]
    width = max([row_tokens, *size])
    free, place = [], {}  # tokens left in each row; tree -> (row, column)
    for index in sorted(range(len(trees)), key=lambda index: -size[index]):
        row = next((row for row, left in enumerate(free) if left >= size[index]), len(free))
        if row == len(free):
            free.append(width)
        place[index] = (row, width - free[row])
        free[row] -= size[index]
    width -= min(free)
    token = [[0] * width for _ in free]
    position = [[0] * width for _ in free]
    end = [list(range(1, width + 1)) for _ in free]
    target, predictor, owner, last, nodes, first_node = [], [], [], [], [], []
    for index, tree in enumerate(trees):
        row, column = place[index]
        base, tails = len(nodes), {-1: None}
        first_node.append(base)
        last += [0] * len(tree.nodes)
        for node_index, depth in flat[index][0]:
            node, length = tree.nodes[node_index], flat[index][1][node_index]
            count = len(node.tokens)
            token[row][column:column + count] = node.tokens
            position[row][column:column + count] = range(depth, depth + count)
            end[row][column:column + count] = [column + length] * count
            before = tails[node.parent]
            for offset, sampled in enumerate(node.sampled):
                here = row * width + column + offset
                if sampled and before is not None:
                    target.append(here)
                    predictor.append(before)
                    owner.append(base + node_index)
                before = here
            tails[node_index] = last[base + node_index] = before
            column += count
        nodes += tree.nodes
    return Pack(*map(torch.tensor, (token, position, end, target, predictor, owner, last)), nodes, first_node)
