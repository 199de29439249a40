"""Flags, questions, answers, tokens and files: what the commands read and write.

A solution is a list of steps, one line each. Questions come from the built-in task or from JSONL files; trees (see
svpo.py) are written as JSON lines.
"""
import argparse
import dataclasses
import glob
import hashlib
import json
import os
import random
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from svpo import InputError, Tree, TreeNode, flag, pack  # noqa: F401  (pack and flag are passed on)


def parse_args(description: str, stages: tuple, argv: list[str], required: tuple = ()) -> tuple:
    """One flag for each field of each stage's dataclass; returns one instance a stage, or raises InputError."""
    def fail(message):
        raise InputError(message)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    fields = {item.name: item for stage in stages for item in dataclasses.fields(stage)}
    for stage in stages:
        group = parser.add_argument_group(stage.__name__, stage.__doc__)
        for item in dataclasses.fields(stage):
            default, built_in = item.default, item.metadata["built_in"]
            shown = " ".join(default) if item.type is tuple else default
            text = item.metadata["help"] + (f" ({shown}" if shown != "" else "")
            text += (f"; built-in task: {built_in})" if built_in != default else ")") if shown != "" else ""
            kind = {"type": item.type, "choices": item.metadata["choices"]}
            kind = {"action": argparse.BooleanOptionalAction} if item.type is bool else kind
            kind = {"nargs": "+"} if item.type is tuple else kind
            group.add_argument("--" + item.name.replace("_", "-"), required=item.name in required,
                               help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    task = "built_in" if is_built_in(given.get("data", fields["data"].default)) else None
    values = {name: given.get(name, item.metadata[task] if task else item.default) for name, item in fields.items()}
    for name, item in fields.items():
        if item.metadata["least"] is not None and not values[name] >= item.metadata["least"]:
            raise InputError(f"--{name.replace('_', '-')} must be at least {item.metadata['least']}, not {values[name]}")
    try:
        device = torch.device(values["device"])
    except RuntimeError as error:
        raise InputError(f"--device {values['device']}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {values['device']}: this machine has {torch.cuda.device_count()} CUDA devices")
    return tuple(stage(**{item.name: values[item.name] for item in dataclasses.fields(stage)}) for stage in stages)


@dataclass(frozen=True)
class SourceConfig:
    """Which model, on which questions."""
    model: str = flag("", "model folder, preset or repository id")
    data: str = flag("", "arithmetic[:SPLIT] (test if not said) or a JSONL file of questions")
    prompt: str = flag("", "file with the text around {question}")
    limit: int = flag(0, "use the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag("float32", "of weights and computing", choices=("float32", "bfloat16"))


def run_command(main):
    """Run a command; bad input is one line on stderr and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def read_json(path: Path) -> dict:
    """The JSON object in a file; InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})")
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is wanted, not {type(value).__name__}")
    return value


def write_json(path: Path, value: dict):
    """Write a JSON file that appears whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def keep_config(path: Path, stages: tuple, free: tuple, write: bool = True, **more):
    """Store the stages' configuration, or check that it equals the stored one but for the `free` fields."""
    config = {type(stage).__name__: dataclasses.asdict(stage) for stage in stages}
    if not path.exists():
        if write:
            write_json(path, {**config, **more})
        return
    stored = read_json(path)
    different = [f"--{name.replace('_', '-')} {stored.get(part, {}).get(name)!r} -> {value!r}"
                 for part, fields in config.items() for name, value in fields.items()
                 if name not in free and stored.get(part, {}).get(name) != value]
    if different:
        raise InputError(f"{path} is of another configuration: {', '.join(different)}; choose another --out")


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
SPLIT_SIZE = {"sft": 13189, "search": 15365, "valid": 2094, "test": 4344}  # different expressions that each one owns


def is_built_in(spec: str) -> bool:
    """Whether a --data names the built-in task, not a file."""
    return spec.split(":")[0] == "arithmetic"


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
    if count > SPLIT_SIZE[split]:
        raise InputError(f"{count} questions of split {split!r} are wanted, but the built-in task has only {SPLIT_SIZE[split]}")
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
    if is_built_in(spec):
        split = spec.partition(":")[2] or "test"
        if split not in SPLITS:
            raise InputError(f"{spec}: the splits of the built-in task are {', '.join(SPLITS)}")
        return arithmetic_questions(split, 500 if limit is None else limit, seed)
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


def read_rows(path: Path, limit: int | None = None, content: bytes | None = None):
    """(line number, object) of each non-blank line of a JSONL file, or of its `content`; the first `limit` of them."""
    try:
        lines = (path.read_bytes() if content is None else content).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    for number, line in [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
NUMBER = re.compile(r"([-+]?)\s*\$?\s*([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:\s*/\s*\d+)?)\s*%?(?:\s+[A-Za-z][A-Za-z .]*)?")


def extract_answer(text: str) -> str | None:
    """The text after the last `####` or "The answer is" on its line; None where no answer is stated."""
    found = ANSWER.findall(text)
    return found[-1].strip().rstrip(".") or None if found else None


def to_number(text: str) -> Fraction | None:
    """Exact value of a plain number, decimal or fraction; `$`, `%`, thousands commas and unit words behind it are
    ignored; None for anything else."""
    match = NUMBER.fullmatch(text.strip())
    digits = "".join(match.groups()).replace(",", "").replace(" ", "") if match else ""
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
        # of each token: ends the text, holds a line break, holds visible text, holds visible text before its line break
        self.tables_4V = torch.tensor([[index in eos_ids, "\n" in text, bool(text.strip()), bool(text.partition("\n")[0].strip())]
                                       for index, text in enumerate(texts)]).T.contiguous()

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
                raw = read_json(Path(folder) / name)
                ids = raw.get("eos_token_id")
                eos_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
                vocabulary = raw.get("vocab_size", vocabulary)
        if vocabulary is not None and tokenizer.get_vocab_size() > vocabulary:
            raise InputError(f"{path}: {tokenizer.get_vocab_size()} tokens, but the model's vocabulary has {vocabulary}")
        return StepTokenizer(tokenizer, sorted(eos_ids), template)

    def encode_prompt(self, question: Question, room: int | None = None) -> list[int]:
        """The prompt's tokens; more than `room` are refused."""
        prompt = self.tokenizer.encode(self.template.replace("{question}", question.text)).ids
        if room is not None and len(prompt) > room:
            raise InputError(f"question {question.id}: its prompt has {len(prompt)} tokens, but beside one step the model's "
                             f"context has room for {room}")
        return prompt

    def encode_steps(self, solution: str) -> list[list[int]]:
        """One token list a line; the last step ends with end-of-text in place of the line break."""
        lines = [line + "\n" for line in solution.split("\n") if line.strip()]
        lines[-1:] = [line[:-1] for line in lines[-1:]]
        steps = [self.tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
        return steps[:-1] + [step + self.eos_ids[:1] for step in steps[-1:]]

# --------------------------------------------------------------------------------------------- trees
def write_tree(file, tree: Tree):
    """Append one tree as one JSON line."""
    file.write(json.dumps(dataclasses.asdict(tree)) + "\n")
    file.flush()


def read_trees(path: str | Path, content: bytes | None = None) -> list[Tree]:
    """All trees of a JSONL file; InputError names the line of a malformed one."""
    trees = []
    for number, row in read_rows(Path(path), content=content):
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


def resume_trees(path: Path, rank: int = 0, ranks: int = 1) -> list[Tree]:
    """The trees of `path` and of every rank's file beside it (stem-RANK.suffix), which may be of another rank count. A torn
    last line is cut off, and said; a file that another rank may be writing is read as far as it is whole."""
    trees = {}
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}*{glob.escape(path.suffix)}")):
        match = re.fullmatch(r"(?:-(\d+))?", file.name.removeprefix(path.stem).removesuffix(path.suffix))
        if not match or file != path and file.with_name(file.name + ".config").exists():  # that one is a search of its own
            continue
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if int(match[1] or 0) % ranks == rank and whole < len(content):
            os.truncate(file, whole)
            print(f"{file}: the last line was torn and has been cut off; its question is searched again")
        found = read_trees(file, content[:whole])
        if doubled := sum(tree.id in trees for tree in found):
            print(f"{file}: {doubled} trees are of questions that have one elsewhere; the first of each counts")
        trees = {tree.id: tree for tree in found} | trees
    return list(trees.values())


def to_tree(question: Question, root, simulations: int, stopped: str) -> Tree:
    """The stored form of a searched tree (mcts.Node), breadth-first."""
    nodes, queue = [], [(root, -1)]
    for node, parent in queue:
        nodes.append(TreeNode(parent, node.tokens, [parent >= 0] * len(node.tokens), node.logp, node.prior,
                              node.visit_count, node.q_value, node.value, node.reward, node.ending))
        queue += [(child, len(nodes) - 1) for child in node.children]
    return Tree(question.id, question.text, question.answer, nodes, simulations, stopped)


def solution_tree(question: Question, tokenizer: StepTokenizer) -> Tree:
    """A worked solution as a tree with one branch."""
    prompt = tokenizer.encode_prompt(question)
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    for step in tokenizer.encode_steps(question.solution):
        nodes.append(TreeNode(len(nodes) - 1, step, [True] * len(step)))
    return Tree(question.id, question.text, question.answer, nodes)


