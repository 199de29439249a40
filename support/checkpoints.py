"""Checkpoints within a stage, its lines in log.jsonl, and requests to stop: what lets a run be killed at any moment and go on.

A checkpoint is a folder checkpoint-STEP in torch.distributed.checkpoint's format, of any number of ranks. It is written aside, synced and
renamed, so a kill leaves it whole or not there (a bit that a disk loses later is not noticed). Nothing in it is unpickled but the names that such a checkpoint needs.
"""
import enum
import json
import os
import pickle
import shutil
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

from model import Llama, save_model
from support.files import publish, settle
from support.flags import InputError
from support.ranks import once

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no group
METADATA = "torch.distributed.checkpoint.metadata"
NAMES = {(METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
                                       "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size"),
    ("pathlib", "PosixPath"), ("pathlib", "Path"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "uint8"))}


def member(kind: type, name: str):
    """What some versions of Python pickle as getattr: a member of an enumeration, and nothing else that an attribute may be."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise InputError(f"it reads attribute {name!r}, which no checkpoint needs")


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return member
        if (module, name) not in NAMES:
            raise InputError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class PlainReader(dcp.FileSystemReader):
    """The library's reader unpickles whatever stands in .metadata."""
    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = PlainUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(dcp.DefaultLoadPlanner):
    """The library's planner unpickles whatever is not a tensor; here that may be numbers and plain containers."""
    def load_bytes(self, read_item, value):
        value.seek(0)
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise InputError(f"{read_item.dest_index.fqn} is neither a number nor a plain container")
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def transfer(action, state: dict, folder: Path, remedy: str, **more):
    """Save or load; what goes wrong on any rank is one line that names the folder."""
    try:
        action(state, no_dist=not dist.is_initialized(), **more)
    except CheckpointException as error:
        cause = inner = next(iter(error.failures.values()))[0]
        if action is dcp.save and not int(os.environ.get("RANK", 0)):
            shutil.rmtree(folder, ignore_errors=True)  # what was written takes room that the next start needs
        if isinstance(cause, (KeyboardInterrupt, torch.OutOfMemoryError)):
            raise cause
        while inner and not isinstance(inner, OSError):  # what the disk said hides behind what the archive writer said
            inner = inner.__context__
        cause = inner or cause
        raise InputError(f"{folder}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}; {remedy}")


def save_checkpoint(stage: Path, model, optimizer, step: int, keep: int):
    """Weights and optimizer state after `step` steps, each rank its shards; the last `keep` checkpoints stay."""
    path, aside = stage / f"checkpoint-{step}", stage / "checkpoint.partial"

    def forget_old():
        for old in find_checkpoints(stage)[:-keep]:
            shutil.rmtree(stage / f"checkpoint-{old}")
    once(lambda: (shutil.rmtree(aside, ignore_errors=True), forget_old()))
    transfer(dcp.save, dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), aside,
             "the checkpoint before it is whole; make room and start again", checkpoint_id=aside)  # its files are synced

    def reveal():
        settle(aside)
        os.replace(aside, path)
        settle(stage)
        forget_old()
    once(reveal)


def find_checkpoints(stage: Path) -> list[int]:
    """Steps after which there is a checkpoint."""
    return sorted(int(path.name[11:]) for path in stage.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir())


def load_checkpoint(stage: Path, model, optimizer) -> int:
    """Load the last checkpoint, which may be of another number of ranks; the steps it has seen, 0 without one."""
    step = max(find_checkpoints(stage), default=0)
    if step:
        folder = stage / f"checkpoint-{step}"
        remedy = "remove it, and training goes on from the one before, or from the stage's start"
        reader = PlainReader(folder)
        try:
            reader.read_metadata()  # here, because the library prints a traceback and looks for other files
        except Exception as error:  # a damaged pickle may raise anything
            raise InputError(f"{folder}: its .metadata is damaged ({type(error).__name__}: {error}); {remedy}")
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        transfer(dcp.load, state, folder, remedy, storage_reader=reader, planner=PlainPlanner())
        try:
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder}: it does not fit this model and optimizer ({type(error).__name__}); {remedy}")
    return step


def write_model(model: Llama, previous: Path, stage: Path):
    """The trained model, whole, with the other files of the folder that it comes from."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save():
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"):
            if (previous / name).exists():
                publish(stage / name, lambda aside, name=name: shutil.copyfile(previous / name, aside))
        save_model(model, stage, state)  # config.json comes last, so a folder that has it is complete
    once(save)


def forget(stage: Path, step: int):
    """Drop what an interrupted write left, and the stage's lines from log.jsonl from `step` on: they are written again."""
    shutil.rmtree(stage / "checkpoint.partial", ignore_errors=True)
    path = stage.parent / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    text = "".join(line for line, row in rows if row["stage"] != stage.name or row["step"] < step)
    publish(path, lambda aside: aside.write_text(text))


class Stop:
    """Within `with Stop() as stop`, SIGINT and SIGTERM only ask: `stop.asked()` says so, on all ranks at the same step."""
    def __enter__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.number = number

    def asked(self) -> int:
        """The signal's number where any rank has got one, else 0."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # it came after the last step
            raise KeyboardInterrupt(self.number)
