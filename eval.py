"""Answering: greedy, sampled, and step-level beam search led by the model's own value; accuracy and value tables.

    python eval.py --model FOLDER --data SPEC --strategy greedy sampled beam:1,5 beam:3,5 --limit N --json out.json

Every strategy is a generator for the driver of mcts.py: it yields nodes to extend and returns the node it answers with.
"""
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Question, StepTokenizer, extract_answer, is_built_in, is_correct, load_questions, parse_args, \
    read_template, run_command, write_json
from mcts import Driver, Node, SearchConfig, check_length, search_trees
from model import Llama, find_folder, load_model
from svpo import InputError, Tree, flag, sibling_pairs


@dataclass(frozen=True)
class AnswerConfig:
    """Answering new questions."""
    answer_temperature: float = flag(0.6, "of beam search; AlphaMath: 0.6 in its config, 1.0 in its table; sampled is at 1.0", least=0)
    answer_lanes: int = flag(32, "steps decoded at once, over all questions", built_in=512, least=1)


def one_path(root: Node, max_depth: int):
    """Extend one solution step by step: greedy at temperature 0, a sample otherwise."""
    node = root
    while not node.ending and node.depth < max_depth:
        node, = yield [node]
    return node


def beam_search(root: Node, beam_width: int, expand_width: int, max_depth: int):
    """Step-level beam search SBS(B1, B2) (AlphaMath algorithm 2), B1 = beam_width, B2 = expand_width.

    Keep the B1 partial solutions whose newest step has the highest V among B2 sampled steps from each (B1 * B2 from the
    root); finished ones leave the beam and shrink it; the answer is the finished solution of highest V. Steps that can
    never answer (cut, ended without an answer, at max_depth) are dropped first: our choice.
    """
    beam, finished = [root], []
    while beam and len(finished) < beam_width:
        open_width = beam_width - len(finished)
        children = yield [node for node in beam for _ in range(expand_width * (beam_width if node is root else 1))]
        useful = [child for child in children if child.ending == "answer" or not child.ending and child.depth < max_depth]
        different = {(id(child.parent), tuple(child.tokens)): child for child in useful}.values()
        best = sorted(different, key=lambda child: -child.value)[:open_width]
        finished += [child for child in best if child.ending]
        beam = [child for child in best if not child.ending]
    return max(finished, key=lambda child: child.value) if finished else None


def plan(strategy: str) -> tuple[int, int]:
    """(B1, B2) of `beam:B1,B2`; (0, 1) for greedy and sampled. Other names raise InputError."""
    if strategy in ("greedy", "sampled"):
        return 0, 1
    try:
        beam_width, expand_width = map(int, strategy.removeprefix("beam:").split(","))
        if strategy.startswith("beam:") and beam_width > 0 and expand_width > 0:
            return beam_width, expand_width
    except ValueError:
        pass
    raise InputError(f"unknown strategy {strategy!r}; there are greedy, sampled and beam:B1,B2")


def standard_error(rate: float, count: int) -> float:
    """Standard error of a share of `count` independent questions."""
    return math.sqrt(rate * (1 - rate) / count)


def answer_questions(model: Llama, tokenizer: StepTokenizer, questions: list[Question], strategy: str,
                     search: SearchConfig, config: AnswerConfig, seed: int = 0) -> dict:
    """Answer every question once; accuracy with its standard error, answers stated, tokens and seconds a question."""
    beam_width, expand_width = plan(strategy)
    lanes = max(1, beam_width * expand_width)
    rows = max(1, min(len(questions), config.answer_lanes // lanes))
    driver = Driver(model, tokenizer, rows, lanes, {"greedy": 0.0, "sampled": 1.0}.get(strategy, config.answer_temperature),
                    search.max_step_tokens, search.row_slots, seed)

    def start(question, root):
        return beam_search(root, beam_width, expand_width, search.max_depth) if beam_width else one_path(root, search.max_depth)
    begin, answers = time.perf_counter(), []
    for question, root, node in tqdm(driver.run(questions, start), total=len(questions), desc=f"answer {strategy}",
                                     unit="question", mininterval=1.0, dynamic_ncols=True, leave=False):
        text = "".join(step.text for step in node.path()) if node else ""
        stated = extract_answer(text) if node and node.ending == "answer" else None
        answers.append({"id": question.id, "text": text, "answer": stated, "correct": is_correct(stated, question.answer)})
    count = len(questions)
    accuracy = sum(row["correct"] for row in answers) / count
    return {"strategy": strategy, "questions": count, "accuracy": accuracy, "standard_error": standard_error(accuracy, count),
            "stated": sum(row["answer"] is not None for row in answers) / count,
            "sampled_tokens": driver.sampled_tokens / count, "seconds": (time.perf_counter() - begin) / count,
            "answers": sorted(answers, key=lambda row: row["id"])}


def grow_judged(model: Llama, tokenizer: StepTokenizer, questions: list[Question], search: SearchConfig, seed: int,
                label: str = "sibling accuracy") -> list[Tree]:
    """Trees to measure sibling accuracy on, grown from outcomes alone: the judged value has no part in their labels."""
    return list(search_trees(model, tokenizer, questions, dataclasses.replace(search, leaf_value=False), seed, label))


def sibling_accuracy(trees: list[Tree]) -> dict:
    """How often V ranks the better of two siblings higher: the mean over trees of the share of their pairs.

    The pairs are those of `sibling_pairs` without a gap; 0.5 is chance. The standard error counts trees, not pairs; None where there
    are too few.
    """
    shares = []
    for tree in trees:
        pairs = sibling_pairs(tree)
        if pairs:
            shares.append(sum(tree.nodes[win].value > tree.nodes[lose].value for win, lose, _ in pairs) / len(pairs))
    count = len(shares)
    mean = sum(shares) / count if count else None
    spread = sum((share - mean) ** 2 for share in shares) / (count - 1) if count > 1 else None
    return {"trees": count, "accuracy": mean, "standard_error": spread and math.sqrt(spread / count)}


def print_table(rows: list[dict], title: str):
    """One line a stage: accuracy in % with its standard error for each strategy, then value sibling accuracy on
    trees of the stage's own policy and on the fixed trees of the SFT policy."""
    strategies = [answer["strategy"] for answer in rows[0]["answers"]]
    names = [f"SBS({name[5:]})" if name.startswith("beam:") else name for name in strategies]
    kinds = [(key, name) for key, name in (("siblings", "siblings own"), ("siblings_fixed", "siblings fixed")) if key in rows[0]]
    print(f"\n{title}\n{'stage':10}" + "".join(f"{name:>14}" for name in names) + "".join(f"{name:>16}" for _, name in kinds))
    for row in rows:
        cells = [f"{100 * answer['accuracy']:.1f} +- {100 * answer['standard_error']:.1f}" for answer in row["answers"]]
        measured = [" +- ".join("-" if row[key][name] is None else f"{row[key][name]:.3f}" for name in ("accuracy", "standard_error"))
                    for key, _ in kinds]
        print(f"{row['stage']:10}" + "".join(f"{cell:>14}" for cell in cells) + "".join(f"{cell:>16}" for cell in measured), flush=True)


@dataclass(frozen=True)
class EvalConfig:
    """Which questions to answer with which model."""
    model: str = flag("", "model folder, preset or repository id")
    data: str = flag("", "arithmetic (test questions) or a JSONL file of questions")
    strategy: tuple = flag(("greedy", "sampled", "beam:1,5", "beam:3,5"), "greedy, sampled or beam:B1,B2")
    prompt: str = flag("", "file with the text around {question}")
    limit: int = flag(0, "answer the first N questions; 0: all (500 built-in ones)", least=0)
    json: str = flag("", "write the table and every answer to this file")
    sibling_data: str = flag("", "questions to search for value sibling accuracy; arithmetic:valid for the built-in task")
    sibling_limit: int = flag(300, "search at most N of them", least=1)
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")


def main():
    config, search, answering = parse_args(__doc__, (EvalConfig, SearchConfig, AnswerConfig), sys.argv[1:], ("model", "data"))
    for strategy in config.strategy:
        plan(strategy)
    if config.json and not os.access(Path(config.json).absolute().parent, os.W_OK):
        raise InputError(f"--json {config.json}: its folder does not exist or cannot be written to")
    questions = load_questions(config.data, config.limit or None)
    folder = find_folder(config.model)
    tokenizer = StepTokenizer.load(folder, read_template(config.prompt))
    model = load_model(folder, config.device)
    for question in questions:
        check_length(question, tokenizer.encode_prompt(question.text), search.max_step_tokens,
                     min(search.row_slots, model.config.max_position_embeddings))
    row = {"stage": Path(config.model).name[:9], "answers": [
        answer_questions(model, tokenizer, questions, strategy, search, answering, config.seed) for strategy in config.strategy]}
    sibling_data = config.sibling_data or ("arithmetic:valid" if is_built_in(config.data) else "")
    if sibling_data:
        row["siblings"] = sibling_accuracy(grow_judged(model, tokenizer, load_questions(sibling_data, config.sibling_limit),
                                                       search, config.seed))
    print_table([row], f"{config.model} on {len(questions)} questions of {config.data}; accuracy in %")
    for answer in row["answers"]:
        print(f"{answer['strategy']:>10}: {answer['sampled_tokens']:.0f} sampled tokens and {answer['seconds']:.3f} s a question, "
              f"{100 * answer['stated']:.1f} % state an answer")
    if config.json:
        write_json(Path(config.json), row)


if __name__ == "__main__":
    run_command(main)
