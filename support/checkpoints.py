"""Checkpoints within a stage, its lines in log.jsonl, and requests to stop.

These let a run be killed at any moment and resumed. A checkpoint is a folder checkpoint-STEP in the
format of torch.distributed.checkpoint, written by any number of ranks. It is written under another
name, synced and renamed, so that a kill leaves a whole checkpoint or none. Nothing in it is
unpickled except the names that such a checkpoint needs.
"""

import enum
import json
import os
import pickle
import re
import shutil
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support.files import publish, sync
from support.flags import InputError
from support.ranks import on_rank_0, rank

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no group
PARTIAL = "checkpoint.partial"  # a checkpoint that is being written
METADATA = "torch.distributed.checkpoint.metadata"
METADATA_NAMES = (
    "Metadata",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "uint8")
ALLOWED = {  # (module, name) of everything that a checkpoint may name
    *((METADATA, name) for name in METADATA_NAMES),
    *(("torch", name) for name in ("Size", *DTYPES)),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


# ------------------------------------------------------------------------ reading without surprises


def enumeration_member(kind: type, name: str):
    """A member of an enumeration. Some versions of Python pickle one as a call of getattr."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise InputError(f"it reads attribute {name!r}, which no checkpoint needs")


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in ALLOWED and no others."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return enumeration_member
        if (module, name) not in ALLOWED:
            raise InputError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class PlainReader(dcp.FileSystemReader):
    """The library's reader, which unpickles anything in .metadata, with PlainUnpickler instead."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = PlainUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(dcp.DefaultLoadPlanner):
    """The library's planner, which unpickles whatever is not a tensor; here only plain values."""

    def load_bytes(self, read_item, value):
        value.seek(0)
        name = read_item.dest_index.fqn
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise InputError(f"{name} is neither a number nor a plain container")
        set_element(self.original_state_dict, self.mappings[name], found)


# ------------------------------------------------------------------------------- saving and loading


def transfer(action, state: dict, folder: Path, remedy: str, **more):
    """Call dcp.save or dcp.load; an error on any rank becomes one line that names the folder."""
    try:
        action(state, no_dist=not dist.is_initialized(), **more)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if action is dcp.save and rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # it takes room that the next start needs
        if isinstance(cause, (KeyboardInterrupt, torch.OutOfMemoryError)):
            raise cause
        disk = cause
        while disk and not isinstance(disk, OSError):  # hidden behind the archive writer's error
            disk = disk.__context__
        cause = disk or cause
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise InputError(f"{folder}: {reason}; {remedy}")


def save_checkpoint(stage: Path, model, optimizer, step: int, keep: int):
    """Save weights and optimizer state after `step` steps, each rank its shards.

    The last `keep` checkpoints stay, older ones are removed.
    """
    partial = stage / PARTIAL

    def remove_old():
        for old in find_checkpoints(stage)[:-keep]:
            shutil.rmtree(stage / f"checkpoint-{old}")

    def make_room():
        shutil.rmtree(partial, ignore_errors=True)
        remove_old()

    def reveal():
        sync(partial)
        os.replace(partial, stage / f"checkpoint-{step}")
        sync(stage)
        remove_old()

    on_rank_0(make_room)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    remedy = "the checkpoint before it is whole; make room and start again"
    transfer(dcp.save, state, partial, remedy, checkpoint_id=partial)  # the library syncs its files
    on_rank_0(reveal)


def find_checkpoints(stage: Path) -> list[int]:
    """The steps after which there is a checkpoint, in order."""
    numbers = [folder.name[11:] for folder in stage.glob("checkpoint-*") if folder.is_dir()]
    return sorted(int(number) for number in numbers if re.fullmatch("[1-9][0-9]*", number))


def remove_checkpoints(stage: Path):
    """Remove the checkpoints of a stage, and what an interrupted write left; nothing else."""
    for step in find_checkpoints(stage):
        shutil.rmtree(stage / f"checkpoint-{step}")
    shutil.rmtree(stage / PARTIAL, ignore_errors=True)


def load_checkpoint(stage: Path, model, optimizer) -> int:
    """Load the last checkpoint, which may be of another number of ranks.

    Returns the number of steps that it has seen, 0 if there is no checkpoint.
    """
    step = max(find_checkpoints(stage), default=0)
    if not step:
        return 0
    folder = stage / f"checkpoint-{step}"
    remedy = "remove it to resume from the checkpoint before it, or from the stage's start"
    reader = PlainReader(folder)
    try:
        reader.read_metadata()  # here, because the library prints a traceback and tries other files
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder}: its .metadata is damaged ({reason}); {remedy}")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    transfer(dcp.load, state, folder, remedy, storage_reader=reader, planner=PlainPlanner())
    try:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        kind = type(error).__name__
        raise InputError(f"{folder}: it does not fit this model and optimizer ({kind}); {remedy}")
    return step


def forget(stage: Path, step: int):
    """Remove what an interrupted write left, and the stage's lines of log.jsonl from `step` on.

    Those steps are taken again.
    """
    shutil.rmtree(stage / PARTIAL, ignore_errors=True)
    log = stage.parent / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, row in rows if row["stage"] != stage.name or row["step"] < step]
    publish(log, lambda partial: partial.write_text("".join(kept)))


# --------------------------------------------------------------------------------- requests to stop


class Stop:
    """Within `with Stop() as stop`, SIGINT and SIGTERM are requests that `stop.asked()` reports."""

    def __enter__(self):
        self.signal = 0
        self.handlers = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number, frame):
        self.signal = number

    def asked(self) -> int:
        """The number of a signal that any rank has received, else 0; the same on all ranks."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and kind is None:  # it came after the last step
            raise KeyboardInterrupt(self.signal)
