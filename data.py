"""Flags, ranks, tokens and files: what the commands read and write. Questions and answers come from tasks/.

A solution is a list of steps; trees (see svpo.py) are written as JSON lines.
"""
import copy
import dataclasses
import fcntl
import glob
import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tokenizers import Tokenizer

from support.flags import parse_args, run_command  # noqa: F401
from svpo import InputError, Tree, TreeNode, flag, pack  # noqa: F401  (passed on, as are the next ones)
from tasks.grading import extract_answer, grade, is_correct  # noqa: F401
from tasks.published import PRESETS, find_folder  # noqa: F401
from tasks.questions import TASKS, Question, grader, is_built_in, load_questions, load_splits, read_rows, task_tokenizer  # noqa: F401
from tasks.steps import chat_template, closed, run_code, split_xml  # noqa: F401


@dataclass(frozen=True)
class SourceConfig:
    """Which model, on which questions."""
    model: str = flag("", "model folder, preset or repository id")
    data: str = flag("", "arithmetic or deduction (built in), with :SPLIT if not test; or benchmarks (NAME[:SPLIT]) and JSONL files of questions", many=True)
    data_dir: str = flag("", "folder of benchmarks, NAME/SPLIT.jsonl; empty: they are downloaded")
    prompt: str = flag("", "file with the text around {question}")
    chat: bool = flag(False, "put the prompt into the model's chat template")
    steps: str = flag("lines", "a step is a line, or XML: <step> with <p>, <code>, <output>", choices=("lines", "xml"))
    tools: str = flag("none", "python: code in XML steps runs, and what it prints is added", choices=("none", "python"))
    limit: int = flag(0, "use the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag("float32", "of weights and computing", choices=("float32", "bfloat16"))


def join_ranks(source: SourceConfig) -> str:
    """Join the other ranks where FSDP is needed: with several of them, or to compute in bfloat16. Returns the device."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if source.device == "cuda" else source.device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    single = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if not single or source.dtype != "float32":  # one rank may search for days longer than another
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=30), **single)
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")
    return device


def share(items) -> list:
    """This rank's share; all, with one process."""
    return list(items)[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else list(items)


def gather(mine: list) -> list:
    """The lists of all ranks in one."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def once(action):
    """Rank 0 does it, all wait."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        action()
    if dist.is_initialized():
        dist.barrier()


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


def settle(path: Path):
    """Have the disk hold a file, or a folder's entries, before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, write: Callable[[Path], None]):
    """Have a file written aside, synced and renamed: it appears whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        settle(aside)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")
    os.replace(aside, path)
    settle(path.parent)


def append(path: Path, text: str):
    """Add a line to a file."""
    try:
        with open(path, "ab", buffering=0) as file:
            line = memoryview(text.encode())
            while line:
                line = line[file.write(line):]
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); what stands there is whole, and the same command goes on from it")


HELD = {}  # lock files of this process


def hold(path: Path):
    """Keep other processes away from what this one writes, for as long as it lives; only rank 0 asks."""
    if int(os.environ.get("RANK", 0)) or path.resolve() in HELD:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{path.parent}: process {os.read(handle, 20).decode(errors='replace') or '?'} is still writing here; end it first")
    HELD[path.resolve()] = handle
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def write_json(path: Path, value: dict):
    """Write a JSON file that appears whole or not at all."""
    publish(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def keep_config(path: Path, stages: tuple, free: tuple, write: bool = True, **more):
    """Store the stages' configuration, or check that it equals the stored one but for the `free` fields."""
    config = {type(stage).__name__: dataclasses.asdict(stage) for stage in stages}
    if not path.exists() and write:
        write_json(path, {**config, **more})
    stored = read_json(path) if path.exists() else config
    different = [f"--{name.replace('_', '-')} {stored.get(part, {}).get(name)!r} -> {value!r}"
                 for part, fields in config.items() for name, value in fields.items()
                 if name not in free and stored.get(part, {}).get(name) != value]
    if different:
        raise InputError(f"{path} is of another configuration: {', '.join(different)}; choose another --out")
    if stored.get("questions", more.get("questions")) != more.get("questions"):
        raise InputError(f"{path} is of other questions than there are now; choose another --out")


def read_template(path: str) -> str:
    """The prompt around {question}: the text of a file, or the question and a line break."""
    if not path:
        return "{question}\n"
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the prompt cannot be read ({error})")
    if "{question}" not in template:
        raise InputError(f"{path}: the prompt must contain {{question}}")
    return template


# --------------------------------------------------------------------------------------------- tokens
class StepTokenizer:
    """A tokenizer.json with the prompt template (in a chat template, where `chat` renders one), end-of-text, and where steps end.

    A step ends with the token in which a line break follows some visible text, wherever in the token that falls; in XML
    with the token that closes `</step>`, whatever else that holds. With `tools` the code of XML steps runs where it ends (tasks/steps.py).
    """
    def __init__(self, tokenizer: Tokenizer, eos_ids: list[int], template: str = "{question}\n", chat=None, xml=False, tools=False):
        self.tokenizer, self.eos_ids, self.template, self.chat, self.xml, self.tools = tokenizer, eos_ids, template, chat, xml, tools
        texts = [tokenizer.decode([index], skip_special_tokens=False) for index in range(1 + max(tokenizer.get_vocab().values()))]
        # of each token: ends the text, may end a step, holds visible text, holds visible text before its line break
        self.tables_4V = torch.tensor([[index in eos_ids, ">" in text, True, True] if xml else
                                       [index in eos_ids, "\n" in text, bool(text.strip()), bool(text.partition("\n")[0].strip())]
                                       for index, text in enumerate(texts)]).T.contiguous()

    @staticmethod
    def load(folder: str | Path, template: str = "{question}\n", **more) -> "StepTokenizer":
        """Read tokenizer.json, and the end-of-text ids from config.json and generation_config.json."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{path}: no such file")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a readable tokenizer ({error})")
        eos_ids, vocabulary, size = set(), 2**24, 1 + max(tokenizer.get_vocab().values(), default=-1)
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                raw = read_json(Path(folder) / name)
                ids, vocabulary = raw.get("eos_token_id"), raw.get("vocab_size", vocabulary)
                ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
                if type(vocabulary) is not int or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
                    raise InputError(f"{Path(folder) / name}: vocab_size and eos_token_id must be a number, and token ids below it")
                eos_ids |= set(ids)
        if not 0 < size <= vocabulary:
            raise InputError(f"{path}: token ids up to {size - 1}, but the model's vocabulary has {vocabulary}")
        return StepTokenizer(tokenizer, sorted(eos_ids), template, **more)

    def encode_prompt(self, question: Question, room: int | None = None) -> list[int]:
        """The prompt's tokens; more than `room` are refused."""
        text = self.template.replace("{question}", question.text)
        prompt = self.tokenizer.encode(self.chat(text.strip()) if self.chat else text, add_special_tokens=not self.chat).ids
        if room is not None and len(prompt) > room:
            raise InputError(f"question {question.id}: its prompt has {len(prompt)} tokens, but beside one step the model's "
                             f"context has room for {room}")
        return prompt

    def under(self, prompt: str) -> "StepTokenizer":
        """The same under another prompt file; itself, if there is none."""
        other = copy.copy(self) if prompt else self
        other.template = read_template(prompt) if prompt else self.template
        return other

    def set_prompt(self, tree: Tree, question: Question) -> Tree:
        """A tree that was grown under another prompt, under this one."""
        prompt = self.encode_prompt(question)
        root = dataclasses.replace(tree.nodes[0], tokens=prompt, sampled=[False] * len(prompt))
        return dataclasses.replace(tree, nodes=[root, *tree.nodes[1:]])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that continues another one: some tokenizers put a space before whatever comes first."""
        anchor = "a" if text[0].isspace() else "\n"
        before, both, alone = (self.tokenizer.encode(part, add_special_tokens=False).ids for part in (anchor, anchor + text, text))
        return both[len(before):] if both[:len(before)] == before else alone

    def encode_steps(self, solution: str) -> list[tuple[list[int], list[bool]]]:
        """Of each step its tokens, and which of them the model is to write; the last one ends with end-of-text, for a line break."""
        lines = [line + "\n" for line in solution.split("\n") if line.strip()]
        lines[-1:] = [line[:-1] for line in lines[-1:]]
        steps = [[(self.encode(text), written) for text, written in step]
                 for step in (split_xml(solution) if self.xml else [[(line, True)] for line in lines])]
        steps[-1:] = [step + [(self.eos_ids[:1], True)] for step in steps[-1:]]
        return [(sum((ids for ids, _ in step), []), [written for ids, written in step for _ in ids]) for step in steps]

    def run_code(self, solutions: list[str], room: list[int]) -> list[list[int]]:
        """Tokens of the output to add to each partial solution, which ends with code; shortened where there is no room for them
        and for the end of the step."""
        outputs = dict(zip(dict.fromkeys(solutions), run_code(list(dict.fromkeys(solutions)))))
        self.tokenizer.encode_special_tokens, found = True, []  # what is printed is text, whatever it looks like
        for solution, left in zip(solutions, room):
            head, tail = "\n"[:not solution.endswith("\n")] + "<output>\n", "\n</output>\n"
            ids = self.encode(head + outputs[solution] + tail)
            if len(ids) > left - 16:
                start, end = self.encode(head), self.encode(tail)
                ids = start + self.encode(outputs[solution] or " ")[:max(0, left - 16 - len(start) - len(end))] + end
            found.append(ids)
        self.tokenizer.encode_special_tokens = False
        return found

    def draw(self, logits_XV: torch.Tensor, uniform_X: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (X,) at a temperature (0: the likeliest) by inverting the cumulative distribution, and their
        untempered log-probabilities. Ids that the tokenizer does not have are never drawn, but count in the softmax."""
        known_XV = logits_XV[:, :self.tables_4V.shape[1]]
        if temperature == 0:
            token_X = known_XV.argmax(dim=-1)
        else:
            cumulative_XV = (known_XV / temperature).softmax(dim=-1).cumsum(dim=-1)
            target_X1 = (uniform_X * cumulative_XV[:, -1])[:, None]
            token_X = torch.searchsorted(cumulative_XV, target_X1, right=True)[:, 0].clamp(max=known_XV.shape[1] - 1)
        logp_X = logits_XV.gather(1, token_X[:, None])[:, 0] - logits_XV.logsumexp(dim=-1)
        return token_X, logp_X


# --------------------------------------------------------------------------------------------- trees
def write_trees(path: Path, trees, mode: str = "a"):
    """Append trees, one JSON line each, as they come; with mode "w" they replace what is there."""
    open(path, mode).close()
    for tree in trees:
        append(path, json.dumps(dataclasses.asdict(tree)) + "\n")
    settle(path)


def fault(index: int, node: TreeNode) -> str:
    """What is wrong with a stored node; nothing as a rule."""
    if type(node.parent) is not int or not -1 <= node.parent < index or (node.parent >= 0) != (index > 0):
        return f"its parent is {node.parent!r}, not a node before it"
    if not isinstance(node.tokens, list) or not node.tokens or not all(type(token) is int and 0 <= token < 2**31 for token in node.tokens):
        return "it has no tokens, or other things than token ids"
    if not isinstance(node.sampled, list) or len(node.sampled) != len(node.tokens) or not all(type(mark) is bool for mark in node.sampled):
        return "'sampled' is not true or false for each token"
    numbers = [node.logp, node.prior, node.q_value, node.value, *([] if node.reward is None else [node.reward])]
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers) or type(node.visit_count) is not int or node.visit_count < 0:
        return "logp, prior, q_value, value, reward or visit_count is not a number that it can be"
    return "" if node.ending is None or isinstance(node.ending, str) else "'ending' is not text"


def read_trees(path: str | Path, content: bytes | None = None) -> list[Tree]:
    """All trees of a JSONL file; InputError names the line of a malformed one."""
    trees = []
    for number, row in read_rows(Path(path), content=content):
        try:
            tree = Tree(**{**row, "nodes": [TreeNode(**node) for node in row["nodes"]]})
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: not a tree ({error})")
        if tree.version != 1 or not tree.nodes or [type(tree.simulations), *map(type, (tree.id, tree.question, tree.answer, tree.stopped))] != [int, *[str] * 4]:
            raise InputError(f"{path}, line {number}: version is not 1, there are no nodes, or a field of the tree is of the wrong type")
        for index, node in enumerate(tree.nodes):
            if problem := fault(index, node):
                raise InputError(f"{path}, line {number}, node {index}: {problem}")
        trees.append(tree)
    return trees


def check_tokens(trees: list[Tree], vocabulary: int, path: str | Path):
    """Refuse trees with token ids that a model does not have."""
    for tree in trees:
        if max(token for node in tree.nodes for token in node.tokens) >= vocabulary:
            raise InputError(f"{path}: the tree of question {tree.id} holds token ids of {vocabulary} and more, which this model does not have")


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
        nodes.append(TreeNode(parent, node.tokens, node.sampled or [parent >= 0] * len(node.tokens), node.logp, node.prior,
                              node.visit_count, node.q_value, node.value, node.reward, node.ending))
        queue += [(child, len(nodes) - 1) for child in node.children]
    return Tree(question.id, question.text, question.answer, nodes, simulations, stopped)


def solution_tree(question: Question, tokenizer: StepTokenizer) -> Tree:
    """A worked solution as a tree with one branch."""
    prompt = tokenizer.encode_prompt(question)
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    for tokens, written in tokenizer.encode_steps(question.solution):
        nodes.append(TreeNode(len(nodes) - 1, tokens, written))
    return Tree(question.id, question.text, question.answer, nodes)


def find_source(source: SourceConfig) -> tuple[Path, "StepTokenizer"]:
    """The folder of the model that a command names, and its tokenizer with the prompt template."""
    folder, xml, tools = find_folder(source.model), source.steps == "xml", source.tools == "python"
    if tools and not xml:
        raise InputError("--tools python needs --steps xml: lines have no code blocks")
    if tools and run_code(["<code>6 * 7</code>"]) != ["42"]:
        raise InputError("--tools python: the sandbox does not compute 6 * 7")
    chat = chat_template(folder) if source.chat else None
    tokenizer = StepTokenizer.load(folder, read_template(source.prompt), chat=chat, xml=xml, tools=tools)  # first: a tokenizer of another model is told by its size
    if not (folder / "value_head.safetensors").exists():
        print(f"{folder} has no value head; it starts at random, and what it ranks is ranked at random")
    return folder, tokenizer


def load_source(source: SourceConfig, question_seed: int = 0) -> tuple:
    """The model (model.Llama), its tokenizer and the questions that a command names."""
    from model import load_model  # here, because model.py reads its files with this module
    questions = load_questions(source.data, source.limit or None, question_seed, source.data_dir)
    folder, tokenizer = find_source(source)
    if is_built_in(source.data) and set(tokenizer.eos_ids) & set(tokenizer.encode_prompt(questions[0])):  # what no word covers is end-of-text there
        raise InputError(f"--data {source.data}: the tokenizer of {folder} does not know its words; the model is of another task")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if source.device == "cuda" else source.device
    return load_model(folder, device, getattr(torch, source.dtype), source.seed), tokenizer, questions
