"""What is read from strangers, and what is written over: pipes, wrong shapes, sizes, locks."""

import errno
import fcntl
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_commands import refused, write_rows
from test_tokenizer_files import build, write

import eval as evaluation
from data import StepTokenizer, Tree, TreeNode, load_questions, read_trees, write_trees
from model import load_model
from support import files
from support.chat import chat_template
from support.checkpoints import PlainUnpickler
from support.figures import draw_accuracy
from support.files import check_output, hold, misfit, publish, read_json, sync
from support.flags import InputError, run_command
from support.hugging_face import weight_files
from support.progress import read_log
from support.tables import STAGE

# ------------------------------------------------------------------------------- pipes and devices


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "value_head.safetensors", "tokenizer.json"]
)
def test_pipes_are_no_model(model_folder, name):
    """Catches a command that waits for ever for what a pipe will say."""
    (model_folder / name).unlink()
    os.mkfifo(model_folder / name)
    with pytest.raises(InputError, match=f"{name}: a folder, pipe or device"):
        StepTokenizer.load(model_folder)
        load_model(model_folder)


@pytest.mark.parametrize("read", [load_questions, read_trees, read_json, read_log])
def test_pipes_are_no_data(tmp_path, read):
    """Catches the same for questions, trees, results and logs."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl: a folder, pipe or device"):
        read(str(tmp_path / "rows.jsonl") if read is load_questions else tmp_path / "rows.jsonl")


def test_an_index_names_files_of_its_folder(model_folder):
    """Catches an index that leads into other folders."""
    (model_folder / "model.safetensors").rename(model_folder / "a.safetensors")
    for name in ("sub/a.safetensors", "..", ""):
        index = {"weight_map": {"model.norm.weight": name}}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="no file of this folder|a folder, pipe"):
            weight_files(model_folder)


# ------------------------------------------------------------------------------------------ outputs


def test_outputs_replace_files_only(tmp_path):
    """Catches --json /dev/null, which replaced the device, and links whose target was left."""
    (tmp_path / "kept.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "kept.json")
    os.mkfifo(tmp_path / "pipe.json")
    for file in (tmp_path / "link.json", tmp_path / "pipe.json", tmp_path):
        for write_to in (lambda file: check_output(file, "--json"), lambda f: publish(f, print)):
            with pytest.raises(InputError, match="a link, folder, pipe or device"):
                write_to(file)
    assert (tmp_path / "link.json").is_symlink()
    (tmp_path / "new.json.partial").symlink_to(tmp_path / "kept.json")
    publish(tmp_path / "new.json", lambda partial: partial.write_text("new"))
    assert (tmp_path / "kept.json").read_text() == "{}"


def test_outputs_do_not_replace_inputs(tmp_path, model_folder):
    """Catches --json that names the questions, a page over its trees, a chart over its figures."""
    write_rows(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    write_trees(tmp_path / "q.html", [Tree("1", "1+1", "2", [TreeNode(-1, [1], [False])])])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    script = str(ROOT / "eval.py")
    common = (script, "--model", str(model_folder), "--data", "q.jsonl", "--strategy", "greedy")
    assert "--json q.jsonl: this is an input" in refused(*common, "--json", "q.jsonl", cwd=tmp_path)
    line = refused(*common, "--budget", "--json", "c.png", cwd=tmp_path)
    assert "chart of --json c.png: this is an input" in line
    line = refused(script, "--show", "q.html", "--model", str(model_folder), cwd=tmp_path)
    assert "page of --show q.html: this is an input" in line
    search = (str(ROOT / "mcts.py"), *common[1:5], "--out", "q.jsonl")
    assert "--out q.jsonl: this is an input" in refused(*search, cwd=tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_outputs_do_not_replace_a_model(tmp_path, model_folder):
    """Catches results that are written over weights or a tokenizer, and a search that cuts the last
    line off a file that is no tree file."""
    write_rows(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2", "solution": "1+1=2"}])
    (tmp_path / "mine.json").write_text('{"my": "results"}')
    files = [*model_folder.iterdir(), tmp_path / "mine.json"]
    before = {file: file.read_bytes() for file in files}
    model = ("--model", str(model_folder))
    data = ("--data", "q.jsonl", "--strategy", "greedy")
    for file in (model_folder / "model.safetensors", model_folder / "tokenizer.json"):
        for words in (data, ("--score", "q.jsonl")):
            line = refused(str(ROOT / "eval.py"), *model, *words, "--json", str(file), cwd=tmp_path)
            assert "this is an input" in line
    for file in (model_folder / "tokenizer.json", tmp_path / "mine.json"):
        line = refused(str(ROOT / "mcts.py"), *model, *data[:2], "--out", str(file), cwd=tmp_path)
        assert "this is an input" in line or "not a tree's; it is left as it is" in line
    assert before == {file: file.read_bytes() for file in files}


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row.pop("answers"), "answers must be a list of items, not None"),
        (lambda row: row.update(answers=[]), "answers must be a list of items"),
        (lambda row: row.update(answers={}), "answers must be a list of items"),
        (lambda row: row["answers"].append(3), r"answers\[1\] must be an object, not 3"),
        (lambda row: row["answers"][0].update(accuracy="1"), r"answers\[0\].accuracy must be a nu"),
        (lambda row: row["answers"][0].update(questions=True), "questions must be int, not True"),
        (lambda row: row.update(siblings={"accuracy": "1"}), "siblings.accuracy must be a number"),
        (lambda row: row.update(stage=None), "stage must be text"),
    ],
)
def test_results_of_a_wrong_shape(tmp_path, change, message):
    """Catches tracebacks of the table and of figures."""
    answer = {"strategy": "greedy", "questions": 3, "accuracy": 1, "standard_error": 0.0}
    row = {"stage": "sft", "answers": [{**answer, "sampled_tokens": 4}], "siblings": None}
    assert misfit(row, STAGE, "") == ""
    change(row)
    (tmp_path / "sft").mkdir()
    file = tmp_path / "sft" / "eval.json"
    file.write_text(json.dumps(row))
    with pytest.raises(InputError, match=f"eval.json: .*{message}"):
        read_json(file, STAGE)
    if "answers" in message:
        with pytest.raises(InputError, match=message):
            draw_accuracy(None, [file])


@pytest.mark.parametrize("line", ["[1]", "{", '{"stage": "sft"}', '{"stage": 1, "step": 1}', "\0"])
def test_bad_lines_of_a_log(tmp_path, line):
    """Catches a traceback when a run with a damaged log is resumed or drawn."""
    (tmp_path / "log.jsonl").write_text('{"stage": "sft", "step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"log.jsonl, line 2: "):
        read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("config", [{}, {"SourceConfig": []}, {"SourceConfig": {"model": 3}}])
def test_the_configuration_of_trees(tmp_path, config):
    """Catches a traceback of eval.py --show where the configuration of a search is damaged."""
    (tmp_path / "t.jsonl.config").write_text(json.dumps(config))
    with pytest.raises(InputError, match="SourceConfig.* must be"):
        evaluation.find_tokenizer(tmp_path / "t.jsonl", "")


# -------------------------------------------------------------------------------------------- sizes


def test_trees_that_are_too_large(tmp_path):
    """Catches a file of a few megabytes whose pairs take all memory: 4,000 siblings twice."""
    root = TreeNode(-1, [1], [False])
    leaves = [TreeNode(0, [2], [True]) for _ in range(2500)]
    write_trees(tmp_path / "wide.jsonl", [Tree("1", "q", "a", [root, *leaves])])
    with pytest.raises(InputError, match="3123750 pairs of siblings, at most 2000000"):
        read_trees(tmp_path / "wide.jsonl")
    long = TreeNode(0, [2] * 2**20, [True] * 2**20)
    write_trees(tmp_path / "long.jsonl", [Tree("1", "q", "a", [root, long])])
    with pytest.raises(InputError, match="1048577 tokens, at most 1048576"):
        read_trees(tmp_path / "long.jsonl")
    write_trees(tmp_path / "good.jsonl", [Tree("1", "q", "a", [root, *leaves[:1500]])])
    assert len(read_trees(tmp_path / "good.jsonl")) == 1


@pytest.mark.parametrize(
    "change",
    [{"reward": 7}, {"q_value": -5.0}, {"value": 2}, {"visit_count": 10**400}, {"prior": "1"}],
)
def test_trees_with_impossible_numbers(tmp_path, change):
    """Catches values outside [-1, 1], which a later figure or loss takes as they are."""
    node = {"parent": 0, "tokens": [2], "reward": 1.0, **change}
    row = {
        "id": "1",
        "question": "q",
        "answer": "a",
        "nodes": [{"parent": -1, "tokens": [1]}, node],
    }
    write_rows(tmp_path / "t.jsonl", [row])
    with pytest.raises(InputError, match="line 1, node 1: .* is not a number that it can be"):
        read_trees(tmp_path / "t.jsonl")


LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "never ends": (LOOPS, "TimeoutError"),
    "doubles": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}",
        "MemoryError|TimeoutError",
    ),
    "multiplies": ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
    "writes": ("{{ 'abcd' * 10 ** 6 }}", "it writes 4000000 characters"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_explode(tmp_path, monkeypatch, name):
    """Catches a template that takes all time or memory; afterwards there is as much as before."""
    monkeypatch.setattr("support.chat.SECONDS", 0.5)
    template, message = TEMPLATES[name]
    write(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(InputError, match=message):
        chat_template(tmp_path)("1+1")
    assert len(bytearray(2**31)) == 2**31
    write(tmp_path, tokenizer_config={"chat_template": "{{ messages[0].content }}!"})
    assert chat_template(tmp_path)("1" * 2 * 10**6) == "1" * 2 * 10**6 + "!"


def replace(pattern: dict, content: str, times: int) -> dict:
    part = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [part] * times}


PARTS = {  # of tokenizer.json, and what is said
    "chain": ({"normalizer": replace({"String": "a"}, "a" * 300, 6)}, "100 times as long"),
    "nothing": ({"normalizer": replace({"String": ""}, "abab", 12)}, "100 times as long"),
    "regex": ({"normalizer": replace({"Regex": "x*"}, "abab", 12)}, "100 times as long"),
    "prepend": ({"normalizer": {"type": "Prepend", "prepend": "a" * 999}}, "100 times as long"),
    "strip": (
        {"decoder": {"type": "Strip", "content": "a", "start": 10**15, "stop": 0}},
        "100 times as long",
    ),
    "table": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "table of its Precompiled normalizer is damaged",
    ),
    "no table": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "a"}},
        "table of its Precompiled normalizer is damaged",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_tokenizers_that_explode(tmp_path, name):
    """Catches a tokenizer.json that ends the process or takes all memory."""
    change, message = PARTS[name]
    settings = json.loads(build().to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        StepTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}},
    ],
)
def test_tokenizers_that_fail_later_are_one_line(capsys, part):
    """Catches a traceback for a panic of the library, or for its plain exceptions."""
    settings = json.loads(build().to_str()) | part
    tokenizer = type(build()).from_str(json.dumps(settings))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: tokenizer.encode("a text"))
    assert stop.value.code == 2
    assert "error: the tokenizer fails (" in capsys.readouterr().err


def test_memory_that_is_not_there_is_one_line(capsys):
    """Catches the traceback of torch or Python where a foreign file asks for too much."""
    for ask in (lambda: torch.empty(2**60), lambda: bytearray(2**62)):
        with pytest.raises(SystemExit):
            run_command(ask)
        error = capsys.readouterr().err
        assert error.startswith("error: out of memory") and error.count("\n") == 1


# --------------------------------------------------------------------------- checkpoints and locks


def test_a_checkpoint_changes_no_class():
    """Catches metadata that sets attributes of a class, for example where a run writes its log."""
    name = "torch.distributed.checkpoint.metadata"
    opcodes = f"c{name}\nStorageMeta\n(dS'load_id'\nS'x'\nsb.".encode()
    with pytest.raises(InputError, match="sets the state of a type"):
        PlainUnpickler(io.BytesIO(opcodes)).load()
    enum = b"c" + name.encode() + b"\n_MEM_FORMAT_ENCODING\n(I0\ntR(dS'x'\nI1\nsb."
    with pytest.raises(InputError, match="sets the state of a _MEM_FORMAT_ENCODING"):
        PlainUnpickler(io.BytesIO(enum)).load()
    assert pickle.BUILD == b"b"


HOLDER = "import sys, time; from pathlib import Path; from support.files import hold; "
HOLDER += "hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_each_rank_has_a_lock(tmp_path, monkeypatch):
    """Catches a rank of a killed run that still writes to its files while another run starts."""
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    left = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert left.stdout.readline() == "held\n"
    message = f"process {left.pid} is still writing here"
    with pytest.raises(InputError, match=message):  # one process, where there were two
        hold(tmp_path / "lock")
    monkeypatch.setattr(files, "LOCKS", {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    hold(tmp_path / "lock")  # rank 0 of two: rank 1 finds the lock itself
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match=message):
        hold(tmp_path / "lock")
    left.kill()
    left.communicate()
    hold(tmp_path / "lock")


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    """Catches a run that cannot start where there are no locks, or where folders do not sync."""

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def cannot(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files, "LOCKS", {})
    monkeypatch.setattr(fcntl, "flock", fail)
    hold(tmp_path / "lock")
    assert "there are no locks here; let no other process" in capsys.readouterr().out
    monkeypatch.setattr(os, "fsync", cannot)
    sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        sync(tmp_path / "file")
