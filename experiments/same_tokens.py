"""Greedy answers of ours and of `transformers` generate: the same questions, prompts and grader; are the token ids the same?

    python experiments/same_tokens.py --model FOLDER --data mawps:singleop --limit 200 --data-dir DIR --prompt prompts/word_problems.txt

Needs transformers. The peer decodes each question alone, as many tokens as ours has; ours many questions at once, in a tree-shaped cache.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import SourceConfig, extract_answer, find_folder, is_correct, load_source, parse_args, run_command  # noqa: E402
from eval import AnswerConfig, plan  # noqa: E402
from mcts import Driver, SearchConfig  # noqa: E402


@torch.inference_mode()
def main():
    source, search, answering = parse_args(__doc__, (SourceConfig, SearchConfig, AnswerConfig), sys.argv[1:], ("model", "data"))
    from transformers import AutoModelForCausalLM
    model, tokenizer, questions = load_source(source)
    greedy = plan("greedy", search, answering)
    driver = Driver(model, tokenizer, questions, answering.answer_lanes, 1, 0.0, search, 1, through=greedy.through, fit=True)
    ends = []  # of every question, whether it states an answer or not
    for question, root, node in driver.run(lambda question, root: last(root), "ours"):
        ends.append((question, [token for step in node.path() for token in step.tokens], node.text))
    peer = AutoModelForCausalLM.from_pretrained(find_folder(source.model), dtype=getattr(torch, source.dtype)).to(source.device).eval()
    same, right = 0, [0, 0]
    for question, ours, text in tqdm(ends, "transformers", mininterval=1.0):
        prompt = torch.tensor([tokenizer.encode_prompt(question)], device=source.device)
        theirs = peer.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(ours),
                               pad_token_id=0)[0, prompt.shape[1]:].tolist()
        same += theirs == ours
        for side, answer in enumerate((text, tokenizer.tokenizer.decode(theirs))):
            stated = extract_answer(answer)
            right[side] += stated is not None and is_correct(stated, question.answer)
    count = len(ends)
    print(f"{source.data}: {count} questions, identical token ids on {same} ({100 * same / count:.1f} %); right: ours {right[0]} "
          f"({100 * right[0] / count:.1f} %), transformers {right[1]} ({100 * right[1] / count:.1f} %)")


def last(root):
    """The end of one solution, whatever it is."""
    node, = yield [root]
    return node


if __name__ == "__main__":
    run_command(main)
