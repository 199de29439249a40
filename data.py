"""Tokens, and trees of them: what the commands read. Questions and answers come from tasks/, files from support/.

A solution is a list of steps; trees (see svpo.py) are written as JSON lines.
"""
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import load_model
from support.flags import InputError, flag, parse_args, run_command  # noqa: F401  (passed on, as are the next ones)
from support.hugging_face import read_tokenizer
from support.ranks import device_of
from support.tree_files import read_trees, resume_trees, write_trees  # noqa: F401
from svpo import Tree, TreeNode, pack  # noqa: F401
from tasks.grading import extract_answer, grade, is_correct  # noqa: F401
from tasks.published import PRESETS, find_folder  # noqa: F401
from tasks.questions import TASKS, Question, grader, is_built_in, load_questions, task_tokenizer  # noqa: F401
from tasks.steps import chat_template, run_code, split_xml


@dataclass(frozen=True)
class SourceConfig:
    """Which model, on which questions."""
    model: str = flag("", "model folder, preset or repository id")
    data: str = flag("", "arithmetic or deduction (built in), with :SPLIT if not test; or benchmarks (NAME[:SPLIT]) and JSONL "
                         "files of questions", many=True)
    data_dir: str = flag("", "folder of benchmarks, NAME/SPLIT.jsonl; empty: they are downloaded")
    prompt: str = flag("", "file with the text around {question}")
    chat: bool = flag(False, "put the prompt into the model's chat template")
    steps: str = flag("lines", "a step is a line, or XML: <step> with <p>, <code>, <output>", choices=("lines", "xml"))
    tools: str = flag("none", "python: code in XML steps runs, and what it prints is added", choices=("none", "python"))
    limit: int = flag(0, "use the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag("float32", "of weights and computing", choices=("float32", "bfloat16"))


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
    with the token that closes `</step>`, whatever else that holds. With `tools` the code of XML steps runs where it ends
    (tasks/steps.py).
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
        """Of a folder in Hugging Face's layout."""
        return StepTokenizer(*read_tokenizer(Path(folder)), template, **more)

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
        before, both, alone = (self.tokenizer.encode(part, add_special_tokens=False).ids
                               for part in (anchor, anchor + text, text))
        return both[len(before):] if both[:len(before)] == before else alone

    def encode_steps(self, solution: str) -> list[tuple[list[int], list[bool]]]:
        """Of each step its tokens, and which of them the model is to write; the last one ends with end-of-text, for a line break."""
        lines = [line + "\n" for line in solution.split("\n") if line.strip()]
        lines[-1:] = [line[:-1] for line in lines[-1:]]
        steps = [[(self.encode(text), written) for text, written in step]
                 for step in (split_xml(solution) if self.xml else [[(line, True)] for line in lines])]
        steps[-1:] = [step + [(self.eos_ids[:1], True)] for step in steps[-1:]]
        return [(sum((ids for ids, _ in step), []), [written for ids, written in step for _ in ids]) for step in steps]

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
    # first: a tokenizer of another model is told by its size
    tokenizer = StepTokenizer.load(folder, read_template(source.prompt), chat=chat, xml=xml, tools=tools)
    if not (folder / "value_head.safetensors").exists():
        print(f"{folder} has no value head; it starts at random, and what it ranks is ranked at random")
    return folder, tokenizer


def load_source(source: SourceConfig, question_seed: int = 0) -> tuple:
    """The model (model.Llama), its tokenizer and the questions that a command names."""
    questions = load_questions(source.data, source.limit or None, question_seed, source.data_dir)
    folder, tokenizer = find_source(source)
    # what no word covers is end-of-text in the built-in tasks
    if is_built_in(source.data) and set(tokenizer.eos_ids) & set(tokenizer.encode_prompt(questions[0])):
        raise InputError(f"--data {source.data}: the tokenizer of {folder} does not know its words; the model is of another task")
    return load_model(folder, device_of(source), getattr(torch, source.dtype), source.seed), tokenizer, questions
