"""Compares greedy answers with `generate` of transformers: are the token ids the same?

    python experiments/same_tokens.py --model FOLDER --data mawps:singleop --limit 200 \\
        --data-dir DIR --prompt prompts/word_problems.txt

Both sides get the same questions, prompts and grader. The peer decodes each question alone, as many
tokens as we have. We decode many questions at once, in a tree-shaped cache. transformers is needed.
"""

import sys
from collections.abc import Generator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import RECIPES, Question, SourceConfig, StepTokenizer
from engine import Engine, Node, load_source
from eval import AnswerConfig, parse_strategy
from mcts import SearchConfig
from model import Llama
from support.flags import parse_args, run_command
from support.hugging_face import find_folder
from support.progress import progress
from tasks.grading import extract_answer, is_correct

Answer = tuple[list[int], str]  # the token ids of a solution, and the text of its last step


def one_solution(root: Node) -> Generator[list[Node], list[Node], Node]:
    """A search for one solution. It returns the last step, whether that states an answer or not."""
    (node,) = yield [root]
    return node


def our_answers(
    model: Llama,
    tokenizer: StepTokenizer,
    questions: list[Question],
    search: SearchConfig,
    answering: AnswerConfig,
) -> list[tuple[Question, Answer]]:
    """Every question with our greedy answer."""
    demand = parse_strategy("greedy", search, answering).demand
    rows = answering.answer_lanes
    engine = Engine(model, tokenizer, questions, demand, search, rows, fit=True)
    found = []
    for question, _, node in engine.run(lambda question, root: one_solution(root), "ours"):
        tokens = [token for step in node.path() for token in step.tokens]
        found.append((question, (tokens, node.text)))
    return found


def load_peer(source: SourceConfig):
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    folder = find_folder(source.model)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, source.dtype))
    return peer.to(source.device).eval()


def peer_answer(peer, tokenizer: StepTokenizer, question: Question, count: int) -> Answer:
    """The first `count` tokens of the peer's greedy answer, and their text."""
    prompt = torch.tensor([tokenizer.encode_prompt(question)], device=peer.device)
    out = peer.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    tokens = out[0, prompt.shape[1] :].tolist()
    return tokens, tokenizer.tokenizer.decode(tokens)


def is_right(text: str, question: Question) -> bool:
    """Whether a text states the right answer."""
    stated = extract_answer(text)
    return stated is not None and is_correct(stated, question.answer)


@torch.inference_mode()
def main():
    configs = (SourceConfig, SearchConfig, AnswerConfig)
    required = ("model", "data")
    configs = parse_args(__doc__, configs, sys.argv[1:], required, RECIPES)
    source, search, answering = configs
    model, tokenizer, questions = load_source(source, 0, "train")
    found = our_answers(model, tokenizer, questions, search, answering)
    peer = load_peer(source)
    same = 0
    ours_right = 0
    peer_right = 0
    with progress(found, "transformers", len(found), "question") as bar:
        for question, (tokens, text) in bar:
            peer_tokens, peer_text = peer_answer(peer, tokenizer, question, len(tokens))
            same += peer_tokens == tokens
            ours_right += is_right(text, question)
            peer_right += is_right(peer_text, question)
    count = len(found)
    print(
        f"{source.data}: {count} questions, identical token ids on {same} "
        f"({100 * same / count:.1f} %); right: ours {ours_right} "
        f"({100 * ours_right / count:.1f} %), transformers {peer_right} "
        f"({100 * peer_right / count:.1f} %)"
    )


if __name__ == "__main__":
    run_command(main)
