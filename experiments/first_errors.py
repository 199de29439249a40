"""Solutions of the task deduction with the first step that does not follow, in ProcessBench's form.

    python experiments/first_errors.py --model FOLDER --out FILE [--count 2000] [--seed 0]
    python eval.py --model FOLDER --score FILE --json values.jsonl

The model samples a solution at temperature 1 to each of `count` test questions. A line has `id`,
`generator`, `problem`, `steps`, `final_answer_correct`, and the `label`: the first step that does
not follow from those before it (`tasks.deduction.sound`), -1 if all follow. Solutions that state no
answer are left out. eval.py then measures how well V finds that step.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from data import RECIPES, Question, SourceConfig
from engine import load_source
from eval import AnswerConfig, answer_questions
from mcts import SearchConfig
from support.files import check_output, write_lines
from support.flags import InputError, parse_args, run_command
from tasks.deduction import sound


def labelled(answers: list[dict], questions: list[Question], generator: str) -> list[dict]:
    """The answers (`eval.grade_solution`) that state one, as rows in ProcessBench's form."""
    texts = {question.id: question.text for question in questions}
    rows = []
    for answer in answers:
        if answer["answer"] is None:
            continue
        lines = [line for line in answer["text"].split("\n") if line.strip()]
        follows = sound(texts[answer["id"]], "\n".join(lines))
        rows.append(
            {
                "id": answer["id"],
                "generator": generator,
                "problem": texts[answer["id"]],
                "steps": lines,
                "final_answer_correct": answer["correct"],
                "label": -1 if all(follows) else follows.index(False),
            }
        )
    return rows


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", required=True, help="model folder, trained on deduction")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=2000, help="questions to answer")
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    check_output(config.out, "--out")
    words = f"--data deduction --limit {config.count} --seed {config.seed} --model".split()
    kinds = (SourceConfig, SearchConfig, AnswerConfig)
    source, *limits = parse_args("", kinds, [*words, config.model], recipes=RECIPES)
    model, tokenizer, questions = load_source(source, source.seed, "test")
    found = answer_questions(model, tokenizer, questions, "sampled", *limits, source.seed)
    rows = labelled(found["answers"], questions, Path(config.model).name)
    if not rows:
        raise InputError(f"{config.model}: none of {len(questions)} solutions states an answer")
    write_lines(config.out, rows)
    right = sum(row["final_answer_correct"] for row in rows)
    wrong = sum(row["label"] >= 0 for row in rows)
    print(
        f"{config.out}: {len(rows)} solutions of {len(questions)}, {right} with the right answer, "
        f"{wrong} with a step that does not follow"
    )


if __name__ == "__main__":
    run_command(main)
