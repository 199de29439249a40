"""Faults: signals, lost ranks, full disks, damaged or hostile files, numbers that go wrong. Each is one clear line, and nothing that was whole is lost."""
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import ROOT, tiny_config
from model import Llama, load_model, save_model
from support.checkpoints import find_checkpoints
from svpo import InputError, LossConfig, Tree, TreeNode
from test_ranks import WORDS, log, same, weights
from test_train import edit, refused

LONG = [*WORDS, "--sft-steps", "400", "--save-every", "5"]


def start(folder, *words, ranks=1, before=(), **more) -> subprocess.Popen:
    """train.py in a process group of its own, which hears SIGINT wherever the tests run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    return subprocess.Popen([*before, *launcher, str(ROOT / "train.py"), *LONG, *map(str, words)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            **{"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more})


def await_lines(folder, process, count: int):
    path = folder / "out" / "log.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "--sft-steps", "30", "--keep", "3")
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return folder


# --------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_request_to_stop_keeps_the_last_step(tmp_path, number, ranks):
    """Catches minutes of training that are lost between two checkpoints, ranks that stop at different steps, and ends that take long."""
    process = start(tmp_path, ranks=ranks)
    await_lines(tmp_path, process, 8)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10 and "interrupted; the same command goes on" in errors
    assert ranks > 1 or process.returncode == 128 + number
    steps, logged = find_checkpoints(tmp_path / "out" / "sft"), log(tmp_path, "sft")
    assert steps == [len(logged)] and steps[0] >= 8  # every step that was logged is kept


def test_requests_at_the_end_of_a_stage(tmp_path):
    """Catches a request that comes with a stage's last step, or while its model is written, and is forgotten, or costs what the last checkpoint has not."""
    import contextlib
    from support.checkpoints import Stop
    with pytest.raises(KeyboardInterrupt) as end:
        with Stop():
            os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.args == (signal.SIGTERM,)
    with contextlib.suppress(ZeroDivisionError), Stop():  # what went wrong counts more
        os.kill(os.getpid(), signal.SIGTERM)
        1 / 0
    (tmp_path / "last.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import support.reports
import train
append = support.reports.append
def last(path, text):
    append(path, text)
    if '"step": 29,' in text:
        os.kill(os.getpid(), signal.SIGTERM)
support.reports.append = last
sys.argv[0] = "train.py"
train.run_command(train.main)
""")
    done = subprocess.run([sys.executable, "last.py", *LONG, "--sft-steps", "30", "--save-every", "1000"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 143 and find_checkpoints(tmp_path / "out" / "sft") == [30], done.stderr
    process = start(tmp_path, "--sft-steps", "30", "--save-every", "1000")
    await_lines(tmp_path, process, 31)  # goes on with the round
    process.kill()
    process.communicate()
    assert [line["step"] for line in log(tmp_path, "sft")] == list(range(30))


def test_one_process_writes_to_a_run(tmp_path):
    """Catches a second run of the same command, or ranks that outlive their torchrun, that train the same steps twice."""
    process = start(tmp_path)
    await_lines(tmp_path, process, 3)
    other = start(tmp_path)
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 2 and f"process {process.pid} is still writing here" in errors
    process.kill()
    process.communicate()


def test_a_lost_rank_ends_the_other(tmp_path):
    """Catches a run that hangs, or says nothing but a traceback, when one of its ranks has died."""
    process = start(tmp_path, ranks=2)
    await_lines(tmp_path, process, 8)
    (victim, *_) = [int(name) for name in os.listdir("/proc") if name.isdigit() and rank_of(name, tmp_path) == "1"]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and "error: another rank has ended; the same command goes on" in errors


def rank_of(number: str, folder) -> str:
    try:
        if os.readlink(f"/proc/{number}/cwd") == str(folder):
            return dict(part.partition("=")[::2] for part in open(f"/proc/{number}/environ").read().split("\0")).get("LOCAL_RANK", "")
    except OSError:
        pass
    return ""


# --------------------------------------------------------------------------------------------- disk

def namespaces() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode


@pytest.mark.parametrize("where", ["checkpoint", "trees"])
def test_a_full_disk_keeps_what_is_whole(tmp_path, undisturbed, where):
    """Catches a checkpoint or tree file that is torn when space runs out, a traceback, and a run that cannot go on once there is room."""
    words = ["--sft-steps", "30", "--keep", "3"]
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    stage = tmp_path / "out" / ("sft" if where == "checkpoint" else "round1")
    if where == "checkpoint":
        shutil.rmtree(stage)
        (tmp_path / "out" / "log.jsonl").write_text("")
    shutil.rmtree(tmp_path / "out" / "round1")
    limit = 3_000_000 if where == "checkpoint" else 8_000  # bytes a file may have: the model fits, its optimizer's state does not

    def quota():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    process = start(tmp_path, *words, preexec_fn=quota)
    _, errors = process.communicate(timeout=200)
    (last,) = [line.partition("error: ")[2] for line in errors.splitlines() if "error: " in line]
    assert process.returncode == 2 and last.startswith("out/") and "File too large" in last and "Traceback" not in errors, errors[-2000:]
    assert not find_checkpoints(stage)
    process = start(tmp_path, *words)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    for name in ("sft", "round1"):
        same(weights(tmp_path, name), weights(undisturbed, name), 0)
        assert log(tmp_path, name) == log(undisturbed, name)


@pytest.mark.skipif(not namespaces(), reason="a file system of its own size cannot be mounted here")
def test_a_disk_that_fills_up(tmp_path):
    """Catches what a limit on one file does not show: no room for anything more, not even for a name. Checkpoints that were whole stay so."""
    (tmp_path / "small").mkdir()
    script = (f"mount -t tmpfs -o size=14m tmpfs small && cd small && ({' '.join([sys.executable, str(ROOT / 'train.py'), *LONG, '--keep', '9'])}; "
              "echo status $?; ls out/sft; "
              f"{' '.join([sys.executable, str(ROOT / 'train.py'), *LONG, '--keep', '1'])}; echo status $?)")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, _, second = done.stdout.partition("status 2")
    assert second, (done.stdout[-1000:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr and "No space left on device" in done.stderr
    kept = [word for word in second.split() if word.startswith("checkpoint-")]
    assert len(kept) >= 2 and second.rstrip().endswith("status 0"), (second, done.stderr[-2000:])  # with fewer kept there is room


# --------------------------------------------------------------------------------------------- damaged and hostile files

@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped with a checkpoint."""
    process = start(tmp_path)
    await_lines(tmp_path, process, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (step,) = find_checkpoints(tmp_path / "out" / "sft")
    return tmp_path / "out" / "sft" / f"checkpoint-{step}"


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def hostile_shards(folder, checkpoint) -> bytes:
    """The same checkpoint with a stranger's code in the place of a learning rate; .metadata is exchanged for one that fits."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    model = load_model(folder / "out" / "start")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sum(head.sum() for head in model(torch.zeros(1, 2, dtype=torch.long))).backward()
    optimizer.step()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = Hostile()
    dcp.save(state, checkpoint_id=folder / "hostile", no_dist=True)
    (checkpoint / ".metadata").write_bytes((folder / "hostile" / ".metadata").read_bytes())
    return (folder / "hostile" / "__0_0.distcp").read_bytes()


def test_damaged_checkpoints_are_refused(tmp_path, stopped):
    """Catches checkpoints that run a stranger's code when they are loaded, and damaged ones that end in a traceback or are taken as they are."""
    metadata, shards = stopped / ".metadata", stopped / "__0_0.distcp"
    whole = {path: path.read_bytes() for path in (metadata, shards)}
    for path, content, message in ((metadata, pickle.dumps(Hostile()), "mkdir"), (metadata, whole[metadata][:200], ".metadata"), (metadata, b"", "Ran out"),
                                   (shards, whole[shards][:5000], "remove it"), (shards, None, "No such file"), (shards, hostile_shards, "neither a number nor a plain container")):
        path.write_bytes(content(tmp_path, stopped) if callable(content) else content) if content is not None else path.unlink()
        process = start(tmp_path)
        _, errors = process.communicate(timeout=60)
        last = errors.splitlines()[-1]
        assert process.returncode == 2 and last.startswith("error: ") and stopped.name in last and message in last and "Traceback" not in errors, (message, errors[-3000:])
        assert "remove it, and training goes on" in last
        path.write_bytes(whole[path])
        metadata.write_bytes(whole[metadata])
        assert not (tmp_path / "owned").exists()
    stopped.rename(stopped.with_name(stopped.name + "-damaged"))  # what the message says helps, also to those who keep things
    process = start(tmp_path)
    await_lines(tmp_path, process, 6)
    process.kill()
    process.communicate()


def test_members_of_enumerations_are_read_and_nothing_else():
    """Catches checkpoints of a Python that pickles such a member as getattr (3.11.2 does), and attributes that lead to a stranger's code."""
    import io
    from support.checkpoints import METADATA, PlainUnpickler

    def load(kind: str, name: str):  # getattr(kind, name), as pickled text
        return PlainUnpickler(io.BytesIO(f"cbuiltins\ngetattr\n(c{METADATA}\n{kind}\nV{name}\ntR.".encode())).load()
    assert load("_MEM_FORMAT_ENCODING", "TORCH_PRESERVE_FORMAT").name == "TORCH_PRESERVE_FORMAT"
    for kind, name in (("Metadata", "__init__"), ("_MEM_FORMAT_ENCODING", "__init__"), ("_MEM_FORMAT_ENCODING", "mro")):
        with pytest.raises(InputError, match="which no checkpoint needs"):
            load(kind, name)


def headed(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def rewrite(folder, change):
    """model.safetensors with other tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def renumber(folder):
    """A tokenizer.json with one id far beyond the others."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["="] = 99999
    (folder / "tokenizer.json").write_text(json.dumps(raw))


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("damage, name", [
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64]), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"), "model.safetensors"),  # a header of 2**64 bytes
    (lambda folder: (folder / "model.safetensors").write_bytes(headed({NORM: {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"\0" * 64)), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(headed({NORM: {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}, b"\0" * 64)), "model.safetensors"),
    (lambda folder: shutil.copyfile(folder / "value_head.safetensors", folder / "model.safetensors"), "missing tensor"),  # swapped
    (lambda folder: rewrite(folder, lambda state: {**state, NORM: state[EMBED], EMBED: state[NORM]}), "has shape"),
    (lambda folder: rewrite(folder, lambda state: {**state, NORM: state[NORM].to(torch.int64)}), "torch.int64"),
    (lambda folder: rewrite(folder, lambda state: {**state, NORM: state[NORM] * torch.nan}), "not finite"),
    (lambda folder: rewrite(folder, lambda state: {**state, EMBED: state[EMBED] / 0}), "not finite"),
    (lambda folder: (os.rename(folder / "model.safetensors", folder / "a.safetensors"), (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NORM: "a.safetensors", EMBED: "b.safetensors"}}))), "b.safetensors"),
    (lambda folder: edit(folder, num_hidden_layers=10**7), "num_hidden_layers"),
    (lambda folder: edit(folder, hidden_size=-32), "hidden_size"),
    (lambda folder: edit(folder, vocab_size=10**12), "vocab_size"),
    (lambda folder: edit(folder, hidden_size=2**23, intermediate_size=2**23), "has shape"),
    (lambda folder: edit(folder, head_dim=7), "even width"),
    (lambda folder: edit(folder, vocab_size="19"), "vocab_size"), (lambda folder: edit(folder, eos_token_id=[[0]]), "eos_token_id"),
    (lambda folder: edit(folder, eos_token_id=99999), "eos_token_id"), (lambda folder: edit(folder, rope_theta=0), "rope_theta"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'), "eos_token_id"),
    (lambda folder: renumber(folder), "99999"),
    (lambda folder: rewrite(folder, lambda state: {**state, "\x1b]0;owned\x07": state[NORM].clone()}), "unexpected tensor \\x1b]0;owned\\x07"),
    (lambda folder: edit(folder, rms_norm_eps="small"), "rms_norm_eps"),
    (lambda folder: edit(folder, max_position_embeddings=3), "context"),
    (lambda folder: (folder / "tokenizer.json").write_bytes(os.urandom(5000)), "tokenizer.json"),
    (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "config.json")])
def test_models_from_strangers(tmp_path, model_folder, damage, name, capsys, monkeypatch):
    """Catches files of a model that load in part, hang, take all memory, or end in a traceback; nothing is written."""
    damage(model_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n')
    begin = time.monotonic()
    assert name in refused(train.main, ["--model", model_folder, "--data", "good.jsonl", "--out", "out"], capsys, monkeypatch)
    assert not (tmp_path / "out").exists() and time.monotonic() - begin < 10


@pytest.mark.parametrize("content, name", [
    (b"", "no questions"), (b'{"question": "\\ud800 1+1", "answer": "1"}', "surrogate"), (b"\n\n \n", "no questions"), (b"\0\0\0\0", "line 1"), (b'{"question": "\xff", "answer": "1"}', "odd.jsonl"),
    (b"\n".join(json.dumps({"question": letter * 10**6, "answer": "1"}).encode() for letter in "1+"), "context"), (json.dumps({"question": "1+1", "answer": "1" * 10**6}).encode() * 2, "line 1")])
def test_questions_that_are_refused(tmp_path, model_folder, content, name, capsys, monkeypatch):
    """Catches empty, huge and binary files of questions that end in a traceback, or start a run of nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_bytes(content)
    assert name in refused(train.main, ["--model", model_folder, "--data", "odd.jsonl", "--out", "out"], capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_questions_of_odd_text_go_through(tmp_path, model_folder):
    """Catches control characters, right-to-left text and NUL that trip the search, the files or the answers."""
    odd = ["1+1\x00?", "\x1b[2J1+1", "\u202e1+1\u202c \u05d0\u05d1\u05d2", "\u20281\x85+\x0b1\x0c", "\U0001f9ee\u200d\u0301", "</script><b>&amp;", "{question}{}%s"]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"question": text, "answer": text + "2", "id": text}) + "\n" for text in odd))
    words = ["--model", model_folder, "--data", "odd.jsonl", "--simulations", "3", "--max-step-tokens", "8", "--max-depth", "3", "--cache-tokens", "8000",
             "--save-every", "99", "--tune-epochs", "1", "--sft-steps", "0", "--rounds", "1", "--out", "out"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    trees = [json.loads(line) for line in (tmp_path / "out" / "round1" / "trees-0.jsonl").read_text().split("\n")[:-1]]
    assert {tree["question"] for tree in trees} < {text.strip() for text in odd} and len(trees) == 6  # one is held out


def test_what_cannot_be_written_or_belongs_to_others(tmp_path, capsys, monkeypatch):
    """Catches folders that cannot be written to, files in a folder's place, and trees of another vocabulary, found after hours or as a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("mine")
    for out, message in (("file", "file"), ("file/out", "file"), ("/proc/out", "/proc/out"), ("others", "holds no run")):
        assert message in refused(train.main, ["--out", out], capsys, monkeypatch)
    assert (tmp_path / "others" / "letter.txt").read_text() == "mine" and len(list((tmp_path / "others").iterdir())) == 1


def test_trees_of_another_vocabulary_are_refused(tmp_path, undisturbed):
    """Catches token ids that a damaged or foreign tree file brings into training."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    path = tmp_path / "out" / "round1" / "trees-0.jsonl"
    for other in (tmp_path / "out" / "round1").iterdir():
        if other != path:
            other.unlink()
    path.write_text(path.read_text().replace('"tokens": [', '"tokens": [99999, ').replace('"sampled": [', '"sampled": [false, '))
    process = start(tmp_path, "--sft-steps", "30")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "token ids of 15 and more" in errors.splitlines()[-1]


# --------------------------------------------------------------------------------------------- numbers

def test_values_load_back_bit_equal(tmp_path):
    """Catches rounding between a model and its file, the value head's too."""
    model = Llama(tiny_config()).init_weights(0).eval()
    token_BT = torch.arange(18)[None]
    save_model(model, tmp_path)
    with torch.inference_mode():
        for ours, theirs in zip(model(token_BT), load_model(tmp_path)(token_BT)):
            assert torch.equal(ours, theirs)


def test_text_does_not_steer_the_terminal():
    """Catches steps of a model that clear the screen, or turn round what is read."""
    from support.reports import visible
    assert visible("a\tb\n\x1b[2J \u202e1\x00") == "a\tb\n\\x1b[2J \\x202e1\\x00"


def test_trees_without_preferences_are_said(capsys, tokenizer):
    """Catches a round of all-right or all-wrong trees that goes by without a word."""
    from support.reports import describe
    step = [5, 0]
    trees = [Tree("q", "?", "1", [TreeNode(-1, [3], [False]), *(TreeNode(0, step, [True] * 2, visit_count=1, q_value=reward, reward=reward, ending="answer") for _ in range(2))])
             for reward in (1.0, -1.0)]
    describe(trees, tokenizer, LossConfig())
    assert "no siblings qualify as a pair" in capsys.readouterr().out


def test_a_saturated_value_head_is_said(tmp_path, undisturbed):
    """Catches a value head at +-1, whose gradient is gone, that looks like a model that is sure."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    for name in ("sft", "round1"):
        (tmp_path / "out" / name / "eval.json").unlink()
    head = load_file(tmp_path / "out" / "round1" / "value_head.safetensors")
    save_file({"value_head.weight": head["value_head.weight"] * 0, "value_head.bias": head["value_head.bias"] * 0 + 30}, tmp_path / "out" / "round1" / "value_head.safetensors")
    process = start(tmp_path, "--sft-steps", "30")
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "round1: V is at +-1" in printed and "sft: V is at" not in printed


@pytest.mark.parametrize("objective, refusal", [("svpo", ""), ("step-dpo", "no tree has a step that --objective step-dpo learns from")])
def test_a_round_without_pairs(tmp_path, undisturbed, objective, refusal):
    """Catches a division by no pairs: squared errors are learned all the same, and an objective of pairs alone says that it has nothing."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    stage = tmp_path / "out" / "round1"
    shutil.rmtree(stage)
    stage.mkdir()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["LossConfig"]["objective"] = objective
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for line in (undisturbed / "out" / "round1" / "trees-0.jsonl").read_text().splitlines():
        tree = json.loads(line)
        for node in tree["nodes"]:
            node["q_value"], node["reward"] = -1.0, None if node["reward"] is None else -1.0
        with open(stage / "trees-0.jsonl", "a") as file:
            file.write(json.dumps(tree) + "\n")
    process = start(tmp_path, "--sft-steps", "30", "--objective", objective)
    printed, errors = process.communicate(timeout=100)
    assert "no siblings qualify as a pair" in printed
    if refusal:
        assert process.returncode == 2 and refusal in errors
    else:
        assert process.returncode == 0 and all("mse" in line and "policy" not in line for line in log(tmp_path, "round1"))
