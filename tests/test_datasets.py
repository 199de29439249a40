"""Trees as preference datasets for other trainers, and trees that somebody else made."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, redraw
from test_fork import PATH
from test_svpo import searched
from test_train import command, refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from data import Question, StepTokenizer, Tree, TreeNode, labelled_tree, read_trees, write_trees
from export import FORMATS, as_text, main, preferences, supervision
from model import Llama, load_model, save_model
from support.flags import InputError, run_command
from svpo import (
    Batch,
    LossConfig,
    learn,
    loss_sums,
    pairs_of,
    rescore,
    score,
    sibling_pairs,
)

STEPS = LossConfig("step-dpo")
NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
SOLUTIONS = [  # of 2+3*2, with labels as somebody might give them
    [("3*2=6 -> 2+6", True), ("2+6=1 #### 1", True)],
    [("3*2=6 -> 2+6", True), ("2+6=2 #### 2", False)],
    [("2+3=5 -> 5*2", False), ("5*2=3 #### 3", False)],
]


def write_rows(file: Path, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def export(monkeypatch, trees: Path, model: Path, name: str, *words) -> list[dict]:
    """The rows that the command writes, run in this process."""
    out = trees.with_name(f"{name}.jsonl")
    line = ["export.py", "--trees", trees, "--model", model, "--format", name, "--out", out, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    run_command(main)
    return read_lines(out)


@pytest.fixture
def named_folder(model_folder) -> Path:
    """A model that transformers opens with its tokenizer."""
    (model_folder / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return model_folder


def labelled(tokenizer) -> Tree:
    return labelled_tree(Question("q", "2+3*2", "1"), SOLUTIONS, tokenizer)


def test_rows_of_a_tree_by_hand(tmp_path, named_folder, tokenizer, monkeypatch, capsys):
    """Catches a prompt without the steps so far, winner and loser exchanged, a delimiter or
    end-of-text that is lost, Q of another node, and filters that do not reach the pairs."""
    write_trees(tmp_path / "trees.jsonl", [labelled(tokenizer)], "w")
    words = (monkeypatch, tmp_path / "trees.jsonl", named_folder)
    rows = export(*words, "trl-text")
    known = [[row[name] for name in ("prompt", "chosen", "rejected")] for row in rows]
    assert known == [
        ["2+3*2\n", "3*2=6 -> 2+6\n", "2+3=5 -> 5*2\n"],
        ["2+3*2\n3*2=6 -> 2+6\n", "2+6=1 #### 1<eos>", "2+6=2 #### 2<eos>"],
    ]
    first = {"q_chosen": 1.0, "q_rejected": -1.0, "weight": 0.5, "id": "q"}
    assert {name: rows[0][name] for name in first} == first
    printed = capsys.readouterr().out
    assert "1 trees, 1 with pairs: 2 pairs, of which 0 (0.0 %)" in printed
    assert "\n1 of them have a text without end-of-text" in printed
    (whole,) = export(*words, "trl-text", "--objective", "dpo")
    assert whole["prompt"] == "2+3*2\n" and whole["chosen"] == "3*2=6 -> 2+6\n2+6=1 #### 1<eos>"
    assert whole["rejected"] == "2+3=5 -> 5*2\n5*2=3 #### 3<eos>"
    turns = export(*words, "trl", "--pairs", "best")
    assert [turn["prompt"][0]["content"] for turn in turns] == [row[0] for row in known]
    assert turns[0]["chosen"] == [{"role": "assistant", "content": known[0][1]}]
    assert [turn["weight"] for turn in turns] == [1.0, 1.0]
    row, _ = export(*words, "llama-factory")
    assert [row["instruction"], row["chosen"], row["rejected"]] == known[0] and row["input"] == ""
    _, other, _ = export(*words, "stepwise", "--keep-retokenised")
    assert other["completions"] == ["3*2=6 -> 2+6\n", "2+6=2 #### 2<eos>"]
    assert other["prompt"] == "2+3*2\n" and other["labels"] == [True, False]
    assert other["retokenised"] is False
    soft = export(*words, "stepwise", "--soft-labels")
    assert soft[2]["labels"] == [0.0, 0.0] and soft[0]["labels"] == [1.0, 1.0]
    (tmp_path / "few.txt").write_text("1+1\n1+1=2 #### 2\n{question}\n")
    row, _ = export(*words, "trl-text", "--prompt", tmp_path / "few.txt")
    assert row["prompt"] == "1+1\n1+1=2 #### 2\n2+3*2\n"


def bpe(head: list[str]) -> StepTokenizer:
    """Byte-pair tokens over letters, with the merges ab and ba; `head` begins every text."""
    letters = dict.fromkeys(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet(), "ab", "ba"])
    vocabulary = {word: number for number, word in enumerate(letters)}
    known = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "a")]))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known.decoder = decoders.ByteLevel()
    known.add_special_tokens(["<s>", "</s>"])
    if head:
        known.post_processor = processors.TemplateProcessing(
            single=" ".join([*head, "$A"]),
            special_tokens=[(word, vocabulary[word]) for word in head],
        )
    return StepTokenizer(known, [vocabulary["</s>"]])


def steps_of(tokenizer: StepTokenizer, *steps: tuple[int, list[str], float]) -> Tree:
    """A tree below the prompt "?\\n" of steps given as (parent, their tokens, Q and reward)."""
    prompt = tokenizer.encode_prompt(Question("q", "?", "1"))
    nodes = [TreeNode(-1, prompt, [False] * len(prompt))]
    for parent, words, q in steps:
        tokens = [tokenizer.tokenizer.token_to_id(word) for word in words]
        nodes.append(TreeNode(parent, tokens, [True] * len(tokens), 0.0, 1.0, 1, q, 0.0, q))
    return Tree("q", "?", "1", nodes)


NEWLINE = "Ċ"


@pytest.mark.parametrize("name", FORMATS)
def test_what_does_not_tokenise_back(name):
    """Catches pairs whose text gives other tokens: merged within a step, merged across the prompt's
    end (the trainer would cut elsewhere), and bytes of a letter that are in two steps. They are
    exact where each step is a text of its own."""
    tokenizer = bpe([])
    form = FORMATS[name]

    def exact(*steps) -> list[bool]:
        tree = steps_of(tokenizer, *steps)
        known = as_text(tree, tokenizer, form)
        rows = supervision(known, False) if name == "stepwise" else preferences(known, STEPS, name)
        return [all(known.is_exact(cut, tokenizer, form) for cut in cuts) for _, cuts in rows]

    assert all(exact((0, ["ab", NEWLINE], 1.0), (0, ["b", NEWLINE], -1.0)))
    assert not all(exact((0, ["a", "b", NEWLINE], 1.0), (0, ["b", NEWLINE], -1.0)))
    across = exact((0, ["a"], 1.0), (1, ["b"], 1.0), (1, ["a"], -1.0))  # prompt + "a", then "b"
    assert across and all(across) == (not form.joined)
    halves = exact((0, ["Ã"], 1.0), (1, ["©"], 1.0), (1, ["a"], -1.0))  # the bytes of one letter
    assert halves and not all(halves)


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokens_that_begin_a_text_are_there_once(name):
    """Catches a beginning-of-text that the trainer's tokenizer adds to one in the text, and one
    that is missing where the trainer adds none."""
    tokenizer = bpe(["<s>"])
    tree = steps_of(tokenizer, (0, ["ab", NEWLINE], 1.0), (0, ["b", NEWLINE], -1.0))
    assert tree.nodes[0].tokens[0] == 0
    known = as_text(tree, tokenizer, FORMATS[name])
    assert known.texts == ["?\n" if FORMATS[name].adds_head else "<s>?\n", "ab\n", "b\n"]
    ids = tokenizer.tokenizer.encode(known.texts[0], add_special_tokens=name == "trl-text").ids
    assert ids == (tree.nodes[0].tokens[1:] if name == "stepwise" else tree.nodes[0].tokens)
    assert known.is_exact([[0], [1]], tokenizer, FORMATS[name])
    bare = replace(tree, nodes=[replace(tree.nodes[0], tokens=ids[-2:]), *tree.nodes[1:]])
    exact = as_text(bare, tokenizer, FORMATS[name]).is_exact([[0], [1]], tokenizer, FORMATS[name])
    assert exact == (name != "trl-text")  # its trainer begins every text with <s>


@pytest.mark.parametrize("name", FORMATS)
def test_first_spaces_of_steps(name):
    """Catches spaces that are lost in front of steps: tokenizers such as LLaMA's strip one from
    what they decode, and put one before each text. A trainer that encodes steps alone then gets
    other tokens for a step without a space, and only for that."""
    words = ["</s>", "?", "\n", "▁", "a", "b"]
    known = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    known.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    known.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = StepTokenizer(known, [0])
    tree = steps_of(tokenizer, (0, ["▁", "a", "\n"], 1.0), (0, ["b", "\n"], -1.0))
    text = as_text(tree, tokenizer, FORMATS[name])
    assert text.texts == ["?\n", " a\n", "b\n"]
    exact = [text.is_exact([[0], [step]], tokenizer, FORMATS[name]) for step in (1, 2)]
    assert exact == [True, FORMATS[name].joined]


def test_kept_rows_are_marked(tmp_path, monkeypatch, capsys):
    """Catches retokenised pairs that are written by default, not marked when they are kept, or not
    counted."""
    tokenizer = bpe([])
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    trees = []
    for number, letters in enumerate((["ab"], ["a", "b"])):
        tree = steps_of(tokenizer, (0, [*letters, NEWLINE], 1.0), (0, ["b", NEWLINE], -1.0))
        trees.append(replace(tree, id=str(number)))
    write_trees(tmp_path / "trees.jsonl", trees, "w")
    words = (monkeypatch, tmp_path / "trees.jsonl", tmp_path, "trl-text")
    (row,) = export(*words)
    assert row["id"] == "0" and "retokenised" not in row
    assert "2 pairs, of which 1 (50.0 %)" in capsys.readouterr().out
    kept = export(*words, "--keep-retokenised")
    assert [row["retokenised"] for row in kept] == [False, True]
    assert [row["chosen"] for row in kept] == ["ab\n", "ab\n"]


def test_datasets_opens_the_files(tmp_path, named_folder, model, tokenizer, monkeypatch):
    """Catches rows that `datasets` cannot read, or reads with other types: mixed numbers, labels
    that are no booleans, columns that are missing in some rows."""
    datasets = pytest.importorskip("datasets")
    trees = [labelled(tokenizer), *searched(model, tokenizer)]
    write_trees(tmp_path / "trees.jsonl", trees, "w")
    for name in FORMATS:
        rows = export(monkeypatch, tmp_path / "trees.jsonl", named_folder, name)
        file = str(tmp_path / f"{name}.jsonl")
        found = datasets.load_dataset("json", data_files=file, split="train", cache_dir=tmp_path)
        assert found.to_list() == rows and len(rows) > 3
    assert found.features["q_chosen"].dtype == "float64"


def test_the_loss_of_dpo_trainer(tmp_path, named_folder, model, tokenizer, monkeypatch):
    """Catches exported pairs on which DPOTrainer, as it is, computes another loss than ours: tokens
    that it adds, prompts cut elsewhere, other pairs. Policy and reference are two models."""
    trl = pytest.importorskip("trl")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(redraw(Llama(model.config), seed=1, std=0.1), tmp_path / "reference")
    trees = searched(model, tokenizer)
    write_trees(tmp_path / "trees.jsonl", trees, "w")
    for name, words, losses in (
        ("trl", [], STEPS),
        ("trl", ["--objective", "dpo"], LossConfig("dpo")),
        ("trl-text", [], STEPS),
    ):
        rows = export(monkeypatch, tmp_path / "trees.jsonl", named_folder, name, *words)
        assert len(rows) == sum(len(pairs_of(tree, losses)) for tree in trees) > 3
        config = trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=len(rows),
            beta=losses.beta,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        file = str(tmp_path / f"{name}.jsonl")
        trainer = trl.DPOTrainer(
            AutoModelForCausalLM.from_pretrained(named_folder, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32),
            args=config,
            train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=tmp_path),
            processing_class=AutoTokenizer.from_pretrained(named_folder),
        )
        theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        ours = our_loss(load_model(named_folder), load_model(tmp_path / "reference"), trees, losses)
        assert abs(ours - 0.6931) > 1e-3  # the policy is not its reference
        same = ours == pytest.approx(theirs.item(), abs=1e-4)
        assert same == (name == "trl")  # to plain texts it adds end-of-text


def our_loss(policy, reference, trees: list[Tree], losses: LossConfig) -> float:
    """Our preference loss, with the same weight for each pair as in other trainers."""
    lessons = [learn(tree, losses) for tree in rescore(reference, trees)]
    lessons = [lesson for lesson in lessons if lesson.pairs]
    batch = Batch(lessons, losses)
    batch.weight_P.fill_(1.0)
    with torch.no_grad():
        sums = loss_sums(*score(policy, batch.packed), batch, losses)
    return sums["policy"].item() / len(batch.weight_P)


def test_bad_input_to_the_dataset_command(tmp_path, named_folder, tokenizer, capsys, monkeypatch):
    """Catches tracebacks, a dataset of nothing, trees of another model taken for this one's, and
    files that are written over."""
    monkeypatch.chdir(tmp_path)
    tree = labelled(tokenizer)
    foreign = copy.deepcopy(tree)
    foreign.nodes[0].tokens = tokenizer.encode("6*6-6\n")
    high = copy.deepcopy(tree)
    high.nodes[1].tokens[0] = 999
    for name, trees in {"good": [tree], "foreign": [foreign], "high": [high]}.items():
        write_trees(tmp_path / f"{name}.jsonl", trees, "w")
    write_trees(tmp_path / "root.jsonl", [replace(tree, nodes=tree.nodes[:1])], "w")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "questions.jsonl", [{"question": "1+1", "answer": "2"}])
    usual = {"--trees": "good.jsonl", "--model": named_folder, "--format": "trl", "--out": "new"}
    for changed, message in (
        ({"--trees": "absent.jsonl"}, "--trees absent.jsonl: no such file"),
        ({"--trees": "questions.jsonl"}, "questions.jsonl, line 1: not a tree"),
        ({"--trees": "empty.jsonl"}, "nothing to write; 0 trees"),
        ({"--trees": "root.jsonl"}, "nothing to write; 1 trees with 0 pairs"),
        ({"--trees": "foreign.jsonl"}, "are they of another model?"),
        ({"--trees": "high.jsonl"}, "token ids of 15 and more"),
        ({"--format": "csv"}, "'csv'"),
        ({"--out": "good.jsonl"}, "this is an input"),
        ({"--out": "folder"}, "a link, folder"),
        ({"--out": "no/new"}, "its folder does not exist"),
        ({"--out": "questions.jsonl"}, "holds something else"),
        ({"--model": "absent"}, "absent: no such folder"),
        ({"--prompt": "absent.txt"}, "absent.txt"),
        ({"--objective": "rft"}, "the objectives with pairs are svpo, svpo-good-steps"),
        ({"--objective": "none"}, "the objectives with pairs are svpo, svpo-good-steps"),
        ({"--min-gap": "3"}, "nothing to write; 1 trees with 0 pairs"),
        ({"--soft-labels": None}, "--soft-labels"),
    ):
        flags = usual | changed
        words = [word for pair in flags.items() for word in pair if word is not None]
        assert message in refused(main, words, capsys, monkeypatch), changed
        assert not (tmp_path / "new").exists(), changed
    assert "question" in (tmp_path / "questions.jsonl").read_text()
    assert len(read_trees(tmp_path / "good.jsonl")) == 1


def test_a_labelled_tree(tokenizer):
    """Catches steps that are not merged, labels and outcomes on other nodes, end-of-text after a
    solution that states no answer or none after one that does, and labels that mean nothing."""
    tree = labelled(tokenizer)
    texts = [tokenizer.tokenizer.decode(node.tokens, False) for node in tree.nodes]
    assert [(node.parent, text) for node, text in zip(tree.nodes, texts)] == [
        (-1, "2+3*2\n"),
        (0, "3*2=6 -> 2+6\n"),
        (1, "2+6=1 #### 1<eos>"),
        (1, "2+6=2 #### 2<eos>"),
        (0, "2+3=5 -> 5*2\n"),
        (4, "5*2=3 #### 3<eos>"),
    ]
    assert [node.visit_count for node in tree.nodes] == [3, 2, 1, 1, 1, 1]
    assert [node.reward for node in tree.nodes] == [None, None, 1.0, -1.0, None, -1.0]
    assert [node.q_value for node in tree.nodes] == pytest.approx([-1 / 3, 1, 1, -1, -1, -1])
    question = Question("q", "2+3*2", "1")
    soft = labelled_tree(question, [[("2+3=5", 0.5)], [("2+3=5\n", -0.25)]], tokenizer)
    assert len(soft.nodes) == 2 and soft.nodes[1].q_value == pytest.approx(0.125)
    assert tokenizer.tokenizer.decode(soft.nodes[1].tokens, False) == "2+3=5\n"
    early = labelled_tree(question, [[("1 #### 1", True), ("2+3=5", False)]], tokenizer)
    assert 0 not in early.nodes[1].tokens + early.nodes[2].tokens and not early.nodes[1].reward
    for bad in ([], [("2+3", 2.0)], [("2+3", "right")], [("\n", True)], [("2", float("nan"))]):
        with pytest.raises(InputError, match="question q"):
            labelled_tree(question, [bad], tokenizer)


def page_example() -> str:
    """The script of docs/trees.md that makes trees of labelled steps."""
    page = (ROOT / "docs" / "trees.md").read_text()
    return page.partition("```python\n")[2].partition("```")[0]


def test_labelled_steps_are_trained_on(tmp_path, named_folder):
    """Catches a way from somebody's own step labels to a trained model that does not go through:
    the script of docs/trees.md and its file of labels, then training without any search."""
    questions = [{"id": str(n), "question": f"{n}+3*2", "answer": "1"} for n in range(4)]
    write_rows(tmp_path / "questions.jsonl", questions)
    write_rows(tmp_path / "test.jsonl", [{"question": "6*6-6", "answer": "2"}])
    rows = []
    for row in questions:
        for solution in SOLUTIONS:
            steps, labels = zip(*solution)
            rows.append({"id": row["id"], "steps": steps, "labels": labels})
    write_rows(tmp_path / "labels.jsonl", rows)
    (tmp_path / "labels.py").write_text(PATH + page_example())
    done = command("labels.py", named_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = """
        --data questions.jsonl --test-data test.jsonl --trees labelled.jsonl --rounds 1
        --tune-epochs 1 --tune-batch 2 --max-step-tokens 16 --max-depth 3 --out run
    """.split()
    done = command(ROOT / "train.py", "--model", named_folder, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 trees: 100.0 % with a correct solution" in done.stdout and "2.0 pairs" in done.stdout
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert len(log) == 2 and all(row["policy"] > 0 and row["mse"] > 0 for row in log)


def test_the_smallest_tree_by_hand(tmp_path, named_folder):
    """Catches a field of a tree that is needed though docs/trees.md says it is not: its example is
    read, gives its pair and is trained on."""
    page = (ROOT / "docs" / "trees.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith('    {"id"'))
    (tmp_path / "trees.jsonl").write_text(line.strip() + "\n")
    (tree,) = read_trees(tmp_path / "trees.jsonl")
    assert sibling_pairs(tree) == [(1, 2, 1.0)]
    assert [node.visit_count for node in tree.nodes] == [0, 1, 1]
    assert tree.nodes[0].sampled == [False] and all(tree.nodes[1].sampled)
    row = {"id": tree.id, "question": tree.question, "answer": tree.answer}
    write_rows(tmp_path / "questions.jsonl", [row])
    write_rows(tmp_path / "test.jsonl", [{"question": "6*6-6", "answer": "2"}])
    words = """
        --data questions.jsonl --test-data test.jsonl --trees trees.jsonl --rounds 1
        --tune-epochs 1 --tune-batch 1 --max-step-tokens 8 --max-depth 2 --out run
    """.split()
    done = command(ROOT / "train.py", "--model", named_folder, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_lines(tmp_path / "run" / "log.jsonl")
    assert row["policy"] > 0
