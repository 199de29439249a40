"""Faults: signals, lost ranks, full disks, damaged or hostile files, numbers that go wrong.

Each is one clear line, and nothing that was whole is lost.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import conftest
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, tiny_config
from safetensors.torch import load_file, save_file
from test_ranks import WORDS, log, same, weights
from test_train import edit, refused
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import get_state_dict

import train
from data import StepTokenizer, Tree, TreeNode, read_trees
from model import Llama, load_model, save_model
from support.checkpoints import (
    METADATA,
    PlainUnpickler,
    Stop,
    check_coverage,
    find_checkpoints,
    load_checkpoint,
    remove_checkpoints,
)
from support.files import json_object, read_json
from support.flags import InputError, visible
from svpo import LossConfig, read_reference

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = [*WORDS, "--sft-steps", "400", "--save-every", "5"]


def start(folder, *words, ranks=1, **more) -> subprocess.Popen:
    """train.py in a process group of its own, which hears SIGINT wherever the tests run."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher = [sys.executable, *(torchrun if ranks > 1 else [])]
    more = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more}
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *LONG, *map(str, words)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=ENVIRONMENT,
        **more,
    )


def await_lines(folder, process, count: int):
    path = folder / "out" / "log.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "--sft-steps", "30", "--keep", "3")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return folder


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    "number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)]
)
def test_a_request_to_stop_keeps_the_last_step(tmp_path, number, ranks):
    """Catches minutes of training that are lost between two checkpoints, ranks that stop at
    different steps, and ends that take long."""
    process = start(tmp_path, ranks=ranks)
    await_lines(tmp_path, process, 8)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert "interrupted; run the same command again to resume" in errors
    assert ranks > 1 or process.returncode == 128 + number
    (step,) = find_checkpoints(tmp_path / "out" / "sft")
    assert step == len(log(tmp_path, "sft")) >= 8  # every step that was logged is kept


LAST = """
import os
import signal
import sys

sys.path.insert(0, {root!r})
import support.progress
import train
from support.flags import run_command

append = support.progress.append

def last(file, text):
    append(file, text)
    if '"step": 29,' in text:
        os.kill(os.getpid(), signal.SIGTERM)

support.progress.append = last
sys.argv[0] = "train.py"
run_command(train.main)
"""


def test_requests_at_the_end_of_a_stage(tmp_path):
    """Catches a request that comes with a stage's last step, or while its model is written, and is
    forgotten, or costs what the last checkpoint has not."""
    with pytest.raises(KeyboardInterrupt) as end:
        with Stop():
            os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.args == (signal.SIGTERM,)
    with contextlib.suppress(ZeroDivisionError), Stop():  # what went wrong counts more
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    (tmp_path / "last.py").write_text(LAST.format(root=str(ROOT)))
    words = [*LONG, "--sft-steps", "30", "--save-every", "1000"]
    done = subprocess.run(
        [sys.executable, "last.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 143, done.stderr
    assert find_checkpoints(tmp_path / "out" / "sft") == [30]
    process = start(tmp_path, "--sft-steps", "30", "--save-every", "1000")
    await_lines(tmp_path, process, 31)  # goes on with the round
    process.kill()
    process.communicate()
    assert [line["step"] for line in log(tmp_path, "sft")] == list(range(30))


def test_one_process_writes_to_a_run(tmp_path):
    """Catches a second run of the same command, or ranks that outlive their torchrun, that train
    the same steps twice."""
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
    others = [name for name in os.listdir("/proc") if name.isdigit()]
    (victim, *_) = [int(name) for name in others if rank_of(name, tmp_path) == "1"]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    message = "error: another rank has ended; run the same command again to resume"
    assert process.returncode and message in errors


def rank_of(number: str, folder) -> str:
    """The local rank of a process that works in a folder; empty for any other."""
    try:
        if os.readlink(f"/proc/{number}/cwd") == str(folder):
            variables = open(f"/proc/{number}/environ").read().split("\0")
            return dict(part.partition("=")[::2] for part in variables).get("LOCAL_RANK", "")
    except OSError:
        pass
    return ""


# --------------------------------------------------------------------------------------------- disk


def namespaces() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("where", ["checkpoint", "trees"])
def test_a_full_disk_keeps_what_is_whole(tmp_path, undisturbed, where):
    """Catches a checkpoint or tree file that is torn when space runs out, a traceback, and a run
    that cannot go on once there is room."""
    words = ["--sft-steps", "30", "--keep", "3"]
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    stage = tmp_path / "out" / ("sft" if where == "checkpoint" else "round1")
    if where == "checkpoint":
        shutil.rmtree(stage)
        (tmp_path / "out" / "log.jsonl").write_text("")
    shutil.rmtree(tmp_path / "out" / "round1")
    # bytes that a file may have: the model fits, its optimizer's state does not
    limit = 3_000_000 if where == "checkpoint" else 8_000

    def quota():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(tmp_path, *words, preexec_fn=quota)
    _, errors = process.communicate(timeout=200)
    (last,) = [line.partition("error: ")[2] for line in errors.splitlines() if "error: " in line]
    assert process.returncode == 2 and "Traceback" not in errors, errors[-2000:]
    assert last.startswith("out/") and "File too large" in last
    assert not find_checkpoints(stage)
    process = start(tmp_path, *words)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    # trees that are searched beside fewer questions are the same up to rounding
    rounding = 0 if where == "checkpoint" else 1e-5
    for name in ("sft", "round1"):
        same(weights(tmp_path, name), weights(undisturbed, name), rounding)
        for one, two in zip(log(tmp_path, name), log(undisturbed, name), strict=True):
            assert one == pytest.approx(two, rel=rounding, abs=rounding / 10)


@pytest.mark.skipif(not namespaces(), reason="a file system of its own size cannot be mounted here")
def test_a_disk_that_fills_up(tmp_path):
    """Catches what a limit on one file does not show: no room for anything more, not even for a
    name. Checkpoints that were whole stay so."""
    (tmp_path / "small").mkdir()
    command = " ".join([sys.executable, str(ROOT / "train.py"), *LONG])
    script = (
        "mount -t tmpfs -o size=14m tmpfs small && cd small && "
        f"({command} --keep 9; echo status $?; ls out/sft; {command} --keep 1; echo status $?)"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    _, _, second = done.stdout.partition("status 2")
    assert second, (done.stdout[-1000:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr and "No space left on device" in done.stderr
    kept = [word for word in second.split() if word.startswith("checkpoint-")]
    assert len(kept) >= 2, second
    # with fewer kept there is room
    assert second.rstrip().endswith("status 0"), (second, done.stderr[-2000:])


# ------------------------------------------------------------------------ damaged and hostile files


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
    """The same checkpoint with a stranger's code in the place of a learning rate; .metadata is
    exchanged for one that fits."""
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
    """Catches checkpoints that run a stranger's code when they are loaded, and damaged ones that
    end in a traceback or are taken as they are."""
    metadata = stopped / ".metadata"
    shards = stopped / "__0_0.distcp"
    (stopped / "checksums.json").unlink()  # as an older version, or a stranger, leaves it
    whole = {path: path.read_bytes() for path in (metadata, shards)}
    for path, content, message in (
        (metadata, pickle.dumps(Hostile()), "mkdir"),
        (metadata, whole[metadata][:200], ".metadata"),
        (metadata, b"", "EOFError"),
        (shards, whole[shards][:5000], "remove it"),
        (shards, None, "No such file"),
        (shards, hostile_shards, "neither a number nor a plain container"),
    ):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(tmp_path, stopped) if callable(content) else content)
        process = start(tmp_path)
        _, errors = process.communicate(timeout=60)
        last = errors.splitlines()[-1]
        assert process.returncode == 2 and last.startswith("error: "), errors[-3000:]
        assert stopped.name in last and message in last, (message, last)
        assert "Traceback" not in errors
        assert "remove it to resume from the checkpoint before it" in last
        path.write_bytes(whole[path])
        metadata.write_bytes(whole[metadata])
        assert not (tmp_path / "owned").exists()
    # what the message says helps, also to those who keep things
    stopped.rename(stopped.with_name(stopped.name + "-damaged"))
    process = start(tmp_path)
    await_lines(tmp_path, process, 6)
    process.kill()
    process.communicate()


FLIPS = 100 if conftest.LONG else 8  # of each file


def flipped(content: bytes, rng: random.Random) -> bytes:
    """The content with one bit changed."""
    place = rng.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    )


def never_silent(read, files: list):
    """Flip bits of files: `read()` must refuse what it reads, or read the same as before."""
    rng = random.Random(0)
    wanted = read()
    for file in files:
        content = file.read_bytes()
        for _ in range(FLIPS):
            file.write_bytes(flipped(content, rng))
            with contextlib.suppress(InputError):
                assert read() == wanted, file
        file.write_bytes(content)
    assert read() == wanted


def test_no_flipped_bit_is_silent(tmp_path, undisturbed):
    """Catches files of a run that are damaged and are read as other weights, figures or trees.

    A bit of the field's name "blake2b" leaves a field that nobody reads.
    """
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "out", out)
    stage = out / "round1"

    def model():
        state = load_model(stage).state_dict()
        vocabulary = StepTokenizer.load(stage).tokenizer.to_str()
        return {name: tensor.tolist() for name, tensor in state.items()}, vocabulary

    def known(row):
        return {name: row[name] for name in row if len(name) != len("blake2b")}

    def log():
        text = (out / "log.jsonl").read_text(errors="replace")
        return [known(json_object(line, "log")) for line in text.splitlines()]

    def trees():
        return read_trees(stage / "trees-0.jsonl")

    names = "config.json model.safetensors value_head.safetensors model.safetensors.index.json "
    names += "tokenizer.json tokenizer_config.json checksums.json"
    never_silent(model, [stage / name for name in names.split()])
    never_silent(log, [out / "log.jsonl"])
    never_silent(trees, [stage / "trees-0.jsonl"])
    never_silent(lambda: known(read_json(out / "config.json")), [out / "config.json"])
    never_silent(lambda: known(read_json(stage / "eval.json")), [stage / "eval.json"])
    reference = stage / "reference.safetensors"
    count = len(load_file(reference)["logp"])
    never_silent(lambda: read_reference(reference, {}, count), [reference])


def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path, stopped):
    """Catches a checkpoint that is damaged and is loaded as other weights."""

    def read():
        model = load_model(tmp_path / "out" / "start")
        optimizer = torch.optim.AdamW(model.parameters())
        step = load_checkpoint(stopped.parent, model, optimizer)
        moments = [state["exp_avg"].tolist() for state in optimizer.state.values()]
        return step, [parameter.tolist() for parameter in model.parameters()], moments

    never_silent(read, [file for file in stopped.iterdir() if file.is_file()])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda chunks: chunks.pop(), "do not cover"),
        (lambda chunks: chunks.append(chunks[0]), "do not cover"),
        (lambda chunks: setattr(chunks[0], "sizes", torch.Size([1, 2])), "do not cover"),
        (lambda chunks: [setattr(one, "sizes", (-2, -3)) for one in chunks], "do not cover"),
    ],
)
def test_metadata_that_does_not_cover_a_tensor(change, message):
    """Catches a checkpoint that lacks a part of a tensor, which would stay as it was drawn."""
    rows = [ChunkStorageMetadata(torch.Size([2 * n, 0]), torch.Size([2, 3])) for n in range(2)]
    properties = TensorProperties()
    entry = TensorStorageMetadata(properties, torch.Size([4, 3]), rows)
    check_coverage(Metadata({"weight": entry}))
    change(rows)
    with pytest.raises(InputError, match=message):
        check_coverage(Metadata({"weight": entry}))


def test_members_of_enumerations_are_read_and_nothing_else():
    """Catches checkpoints of a Python that pickles such a member as getattr (3.11.2 does), and
    attributes that lead to a stranger's code."""

    def load(kind: str, name: str):  # getattr(kind, name), as pickled text
        text = f"cbuiltins\ngetattr\n(c{METADATA}\n{kind}\nV{name}\ntR."
        return PlainUnpickler(io.BytesIO(text.encode())).load()

    assert load("_MEM_FORMAT_ENCODING", "TORCH_PRESERVE_FORMAT").name == "TORCH_PRESERVE_FORMAT"
    for kind, name in (
        ("Metadata", "__init__"),
        ("_MEM_FORMAT_ENCODING", "__init__"),
        ("_MEM_FORMAT_ENCODING", "mro"),
    ):
        with pytest.raises(InputError, match="which no checkpoint needs"):
            load(kind, name)


NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"


# Each of the next functions returns one that damages a folder.


def written(name: str, content: bytes):
    """A file with other content."""
    return lambda folder: (folder / name).write_bytes(content)


def headed(entry: dict):
    """model.safetensors of one tensor, with this header."""
    text = json.dumps({NORM: entry}).encode()
    return written(WEIGHTS, struct.pack("<Q", len(text)) + text + b"\0" * 64)


def rewritten(change):
    """model.safetensors with other tensors: `change(state)` returns those that differ."""

    def damage(folder):
        state = load_file(folder / WEIGHTS)
        save_file({**state, **change(state)}, folder / WEIGHTS, {"format": "pt"})

    return damage


def configured(**changes):
    """config.json with other fields."""
    return lambda folder: edit(folder, **changes)


def shortened(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-64])


def swapped(folder):
    shutil.copyfile(folder / "value_head.safetensors", folder / WEIGHTS)


def without_a_shard(folder):
    os.rename(folder / WEIGHTS, folder / "a.safetensors")
    index = {"weight_map": {NORM: "a.safetensors", EMBED: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def renumbered(folder):
    """A tokenizer.json with one id far beyond the others."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["="] = 99999
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage, name",
    [
        (shortened, WEIGHTS),
        (written(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS),  # a header of 2**64 bytes
        (headed({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}), WEIGHTS),
        (headed({"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}), WEIGHTS),
        (swapped, "is in another file"),
        (rewritten(lambda state: {NORM: state[EMBED], EMBED: state[NORM]}), "has shape"),
        (rewritten(lambda state: {NORM: state[NORM].to(torch.int64)}), "I64"),
        (rewritten(lambda state: {NORM: state[NORM] * torch.nan}), "not finite"),
        (rewritten(lambda state: {EMBED: state[EMBED] / 0}), "not finite"),
        (without_a_shard, "b.safetensors"),
        (configured(num_hidden_layers=10**7), "num_hidden_layers"),
        (configured(hidden_size=-32), "hidden_size"),
        (configured(vocab_size=10**12), "vocab_size"),
        (configured(hidden_size=2**23, intermediate_size=2**23), "has shape"),
        (configured(head_dim=7), "even width"),
        (configured(vocab_size="19"), "vocab_size"),
        (configured(eos_token_id=[[0]]), "eos_token_id"),
        (configured(eos_token_id=99999), "eos_token_id"),
        (configured(rope_theta=0), "rope_theta"),
        (written("generation_config.json", b'{"eos_token_id": "</s>"}'), "eos_token_id"),
        (renumbered, "99999"),
        (
            rewritten(lambda state: {"\x1b]0;owned\x07": state[NORM].clone()}),
            "unexpected tensor \\x1b]0;owned\\x07",
        ),
        (configured(rms_norm_eps="small"), "rms_norm_eps"),
        (configured(max_position_embeddings=3), "context"),
        (written("tokenizer.json", os.urandom(5000)), "tokenizer.json"),
        (written("config.json", b"\xff\xfe{}"), "config.json"),
    ],
)
def test_models_from_strangers(tmp_path, model_folder, damage, name, capsys, monkeypatch):
    """Catches files of a model that load in part, hang, take all memory, or end in a traceback;
    nothing is written."""
    damage(model_folder)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"}]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", model_folder, "--data", "good.jsonl", "--out", "out"]
    begin = time.monotonic()
    assert name in refused(train.main, words, capsys, monkeypatch)
    assert not (tmp_path / "out").exists() and time.monotonic() - begin < 10


HUGE = [json.dumps({"question": letter * 10**6, "answer": "1"}).encode() for letter in "1+"]
TWICE = json.dumps({"question": "1+1", "answer": "1" * 10**6}).encode() * 2  # on one line


@pytest.mark.parametrize(
    "content, name",
    [
        (b"", "no questions"),
        (b'{"question": "\\ud800 1+1", "answer": "1"}', "surrogate"),
        (b"\n\n \n", "no questions"),
        (b"\0\0\0\0", "line 1"),
        (b'{"question": "\xff", "answer": "1"}', "odd.jsonl"),
        (b"\n".join(HUGE), "context"),
        (TWICE, "line 1"),
    ],
)
def test_questions_that_are_refused(tmp_path, model_folder, content, name, capsys, monkeypatch):
    """Catches empty, huge and binary files of questions that end in a traceback, or start a run of
    nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_bytes(content)
    words = ["--model", model_folder, "--data", "odd.jsonl", "--out", "out"]
    assert name in refused(train.main, words, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_questions_of_odd_text_go_through(tmp_path, model_folder):
    """Catches control characters, right-to-left text and NUL that trip the search, the files or the
    answers."""
    odd = [
        "1+1\x00?",
        "\x1b[2J1+1",
        "\u202e1+1\u202c \u05d0\u05d1\u05d2",
        "\u20281\x85+\x0b1\x0c",
        "\U0001f9ee\u200d\u0301",
        "</script><b>&amp;",
        "{question}{}%s",
    ]
    rows = [{"question": text, "answer": text + "2", "id": text} for text in odd]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = """
        --data odd.jsonl --simulations 3 --max-step-tokens 8 --max-depth 3 --cache-tokens 8000
        --save-every 99 --tune-epochs 1 --sft-steps 0 --rounds 1 --out out
    """.split()
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--model", model_folder, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "out" / "round1" / "trees-0.jsonl").read_text().split("\n")[:-1]
    asked = {json.loads(line)["question"] for line in lines}
    assert asked < {text.strip() for text in odd} and len(lines) == 6  # one is held out


def test_what_cannot_be_written_or_belongs_to_others(tmp_path, capsys, monkeypatch):
    """Catches folders that cannot be written to, files in a folder's place, and trees of another
    vocabulary, found after hours or as a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("mine")
    for out, message in (
        ("file", "file"),
        ("file/out", "file"),
        ("/proc/out", "/proc/out"),
        ("others", "holds no run"),
    ):
        assert message in refused(train.main, ["--out", out], capsys, monkeypatch)
    (letter,) = (tmp_path / "others").iterdir()
    assert letter.read_text() == "mine"


def test_trees_of_another_vocabulary_are_refused(tmp_path, undisturbed):
    """Catches token ids that a damaged or foreign tree file brings into training."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    path = tmp_path / "out" / "round1" / "trees-0.jsonl"
    for other in (tmp_path / "out" / "round1").iterdir():
        if other != path:
            other.unlink()
    text = re.sub(r', "blake2b": "\w+"', "", path.read_text())
    text = text.replace('"tokens": [', '"tokens": [99999, ')
    path.write_text(text.replace('"sampled": [', '"sampled": [false, '))
    process = start(tmp_path, "--sft-steps", "30")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "token ids of 15 and more" in errors.splitlines()[-1]


# ------------------------------------------------------------------------------------------ numbers


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
    assert visible("a\tb\n\x1b[2J \u202e1\x00") == "a\tb\n\\x1b[2J \\x202e1\\x00"


def test_trees_without_preferences_are_said(capsys, tokenizer):
    """Catches a round of all-right or all-wrong trees that goes by without a word."""
    trees = []
    for reward in (1.0, -1.0):
        figures = {"visit_count": 1, "q_value": reward, "reward": reward, "ending": "answer"}
        steps = [TreeNode(0, [5, 0], [True] * 2, **figures) for _ in range(2)]
        trees.append(Tree("q", "?", "1", [TreeNode(-1, [3], [False]), *steps]))
    train.describe(trees, tokenizer, LossConfig())
    assert NO_PAIRS in capsys.readouterr().out


NO_PAIRS = "nothing qualifies as a pair: this round trains without the preference and margin terms"


def test_a_saturated_value_head_is_said(tmp_path, undisturbed):
    """Catches a value head at +-1, whose gradient is gone, that looks like a model that is sure."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    for name in ("sft", "round1"):
        (tmp_path / "out" / name / "eval.json").unlink()
    file = tmp_path / "out" / "round1" / "value_head.safetensors"
    head = load_file(file)
    (file.parent / "checksums.json").unlink()
    weight = torch.zeros_like(head["value_head.weight"])
    bias = torch.full_like(head["value_head.bias"], 30)
    save_file({"value_head.weight": weight, "value_head.bias": bias}, file)
    process = start(tmp_path, "--sft-steps", "30")
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "round1: V is at +-1" in printed and "sft: V is at" not in printed


@pytest.mark.parametrize(
    "objective, refusal",
    [("svpo", ""), ("step-dpo", "no tree has a step that --objective step-dpo learns from")],
)
def test_a_round_without_pairs(tmp_path, undisturbed, objective, refusal):
    """Catches a division by no pairs: squared errors are learned all the same, and an objective of
    pairs alone says that it has nothing."""
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    stage = tmp_path / "out" / "round1"
    shutil.rmtree(stage)
    stage.mkdir()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["LossConfig"]["objective"] = objective
    del config["blake2b"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for line in (undisturbed / "out" / "round1" / "trees-0.jsonl").read_text().splitlines():
        tree = json.loads(line)
        del tree["blake2b"]
        for node in tree["nodes"]:
            node["q_value"] = -1.0
            node["reward"] = None if node["reward"] is None else -1.0
        with open(stage / "trees-0.jsonl", "a") as file:
            file.write(json.dumps(tree) + "\n")
    process = start(tmp_path, "--sft-steps", "30", "--objective", objective)
    printed, errors = process.communicate(timeout=100)
    assert NO_PAIRS in printed
    if refusal:
        assert process.returncode == 2 and refusal in errors
        return
    assert process.returncode == 0, errors
    lines = log(tmp_path, "round1")
    assert lines and all("mse" in line and "policy" not in line for line in lines)


def test_only_checkpoints_of_ours_are_removed(tmp_path):
    """Catches folders of the user that go with the checkpoints of a stage."""
    mine = ["checkpoints-I-keep", "checkpoint-best", "checkpoint-007", "checkpoint"]
    for name in (*mine, "checkpoint-7", "checkpoint-20", "checkpoint.partial"):
        (tmp_path / name).mkdir()
    assert find_checkpoints(tmp_path) == [7, 20]
    remove_checkpoints(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(mine)
