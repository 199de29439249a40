"""Flags, questions, answers, tokens and files: what the commands read and write.

A solution is a list of steps, one line each. Questions come from the built-in task or from JSONL files; trees (see
svpo.py) are written as JSON lines.
"""
import argparse
import dataclasses
import glob
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from svpo import InputError, Tree, TreeNode, flag, pack  # noqa: F401  (passed on, as are the next ones)
from tasks.benchmarks import find_file, to_row
from tasks.grading import algebra, extract_answer, grade, is_correct, needs_algebra  # noqa: F401


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
            kind = {"nargs": "+"} if item.type is tuple or item.metadata["many"] else kind
            group.add_argument("--" + item.name.replace("_", "-"), required=item.name in required,
                               help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    given |= {name: " ".join(given[name]) for name, item in fields.items() if item.metadata["many"] and name in given}
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
    data: str = flag("", "arithmetic[:SPLIT] (test if not said), or benchmarks (NAME[:SPLIT]) and JSONL files of questions", many=True)
    data_dir: str = flag("", "folder of benchmarks, NAME/SPLIT.jsonl; empty: they are downloaded")
    prompt: str = flag("", "file with the text around {question}")
    limit: int = flag(0, "use the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag("float32", "of weights and computing", choices=("float32", "bfloat16"))


PRESETS = {  # names for `find_folder`; any other name is a folder or a Hugging Face repository id
    "llama-7b": "huggyllama/llama-7b", "llama-2-7b": "meta-llama/Llama-2-7b-hf", "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "deepseekmath-7b": "deepseek-ai/deepseek-math-7b-base", "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B", "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


def find_folder(name: str | Path) -> Path:
    """A local folder as it is; otherwise a preset or a repository id, downloaded with huggingface-hub."""
    if Path(name).is_dir():
        return Path(name)
    repository = PRESETS.get(str(name), str(name))
    if str(name) not in PRESETS and (repository.count("/") != 1 or repository.startswith((".", "/", "~"))):
        raise InputError(f"{name}: no such folder, and not a preset ({', '.join(PRESETS)}) or repository id owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # network, authorisation, unknown repository: all end the same way for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no such folder, and downloading {repository} failed: {reason}")


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


def write_json(path: Path, value: dict):
    """Write a JSON file that appears whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


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


@dataclass
class Question:
    id: str
    text: str
    answer: str
    solution: str | None = None  # worked solution, one step a line, for SFT


def is_built_in(spec: str) -> bool:
    """Whether a --data names the built-in task, not a file."""
    return spec.split(":")[0] == "arithmetic"


def load_questions(data: str, limit: int | None = None, seed: int = 0, data_dir: str = "") -> list[Question]:
    """Questions of `arithmetic[:split]` (default split: test), or of benchmarks and JSONL files, the first `limit` of each.

    A row has `question`, `answer` and optionally `solution` and `id`, or the fields of a published benchmark; where the
    answer ends with GSM8K's `#### N`, the text before it is the solution. Raises InputError with file and line.
    """
    if is_built_in(data):
        from tasks.arithmetic import arithmetic_questions
        return arithmetic_questions(data.partition(":")[2] or "test", 500 if limit is None else limit, seed)
    questions, ids = [], set()
    for spec in [data] if Path(data).exists() else data.split():
        path = find_file(spec, data_dir)
        stem = path.stem if path == Path(spec) else f"{path.parent.name}-{path.stem}"
        for number, row in read_rows(path, limit):
            row, where = to_row(row), f"{path}, line {number}"
            if row is None:
                print(f"{where}: no answer; left out")
                continue
            for key in ("question", "answer"):
                if not isinstance(row.get(key), (str, int, float)) or isinstance(row[key], bool) or not str(row[key]).strip():
                    raise InputError(f"{where}: needs a non-empty {key!r} (text or number)")
            answer, solution = str(row["answer"]), row.get("solution")
            if "####" in answer:
                solution = solution or re.sub(r"<<[^<>]*>>", "", answer)  # without GSM8K's calculator marks
                answer = extract_answer(answer) or ""
                if not answer:
                    raise InputError(f"{where}: no answer after '####'")
            if solution is not None and not isinstance(solution, str):
                raise InputError(f"{where}: 'solution' must be text")
            question = Question(str(row.get("id", f"{stem}-{number}")), str(row["question"]).strip(), answer, solution)
            if question.id in ids:
                raise InputError(f"{where}: id {question.id!r} occurs twice")
            ids.add(question.id)
            questions.append(question)
    if not questions:
        raise InputError(f"{data}: no questions in this file")
    hard = [question.answer for question in questions if needs_algebra(question.answer)]
    if hard and not algebra.available():
        raise InputError(f"{data}: {len(hard)} answers, such as {hard[0]!r}, take algebra to compare: pip install math-verify")
    return questions


def load_splits(run) -> dict[str, list]:
    """Disjoint questions for a train.RunConfig: sft (worked solutions), search (a list a round), valid (sibling accuracy), test."""
    if run.data == "arithmetic":
        searched = load_questions("arithmetic:search", run.rounds * run.search_questions, run.seed)
        return {"sft": load_questions("arithmetic:sft", run.sft_questions, run.seed),
                "search": [searched[number::run.rounds] for number in range(run.rounds)],
                "valid": load_questions("arithmetic:valid", run.valid_questions), "test": load_questions("arithmetic:test", run.test_limit)}
    questions = load_questions(run.data, run.limit or None, data_dir=run.data_dir)
    if run.test_data:
        test = load_questions(run.test_data, run.test_limit, data_dir=run.data_dir)
    else:
        held_out = max(1, len(questions) // 5)
        questions, test = questions[:-held_out], questions[-held_out:][:run.test_limit]
        print(f"no --test-data: the last {held_out} questions of {run.data} are held out for the table")
    tested = {question.text for question in test}
    kept = [question for question in questions if question.text not in tested]
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept)} training questions also stand in the test set and are dropped")
    if not kept:
        raise InputError(f"{run.data}: no question is left for training")
    return {"sft": [question for question in kept if question.solution], "search": [kept] * run.rounds, "valid": [], "test": test}


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
def write_trees(file, trees):
    """Append trees, one JSON line each, as they come."""
    for tree in trees:
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


def find_source(source: SourceConfig) -> tuple[Path, "StepTokenizer"]:
    """The folder of the model that a command names, and its tokenizer with the prompt template."""
    folder = find_folder(source.model)
    tokenizer = StepTokenizer.load(folder, read_template(source.prompt))  # first: a tokenizer of another model is told by its size
    if not (folder / "value_head.safetensors").exists():
        print(f"{folder} has no value head; it starts at random, and what it ranks is ranked at random")
    return folder, tokenizer


def load_source(source: SourceConfig, question_seed: int = 0) -> tuple:
    """The model (model.Llama), its tokenizer and the questions that a command names."""
    from model import load_model  # here, because model.py reads its files with this module
    questions = load_questions(source.data, source.limit or None, question_seed, source.data_dir)
    folder, tokenizer = find_source(source)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if source.device == "cuda" else source.device
    return load_model(folder, device, getattr(torch, source.dtype), source.seed), tokenizer, questions
