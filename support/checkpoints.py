"""Checkpoints within a stage, its lines in log.jsonl, and requests to stop.

These let a run be killed at any moment and resumed. A checkpoint is a folder checkpoint-STEP in the
format of torch.distributed.checkpoint, written by any number of ranks. It is written under another
name, synced and renamed, so that a kill leaves a whole checkpoint or none. Nothing in it is
unpickled except the names that such a checkpoint needs.
"""

import enum
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from support.files import (
    check_files,
    is_plain,
    publish,
    read_file,
    sync,
    write_checksums,
)
from support.flags import InputError
from support.progress import read_log
from support.ranks import on_rank_0, rank

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no group
# frozen weights are not stored: they are those of the folder that training started from
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
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

STATEFUL = {  # of these, classes whose objects are pickled with a state
    *((METADATA, name) for name in METADATA_NAMES if name != "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}

# ------------------------------------------------------------------------ reading without surprises


def enumeration_member(kind: type, name: str):
    """A member of an enumeration. Some versions of Python pickle one as a call of getattr."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise InputError(f"it reads attribute {name!r}, which no checkpoint needs")


class PlainUnpickler(pickle._Unpickler):  # the one in C calls nothing for a state
    """An unpickler that knows the names in ALLOWED and no others, and changes no class."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        """Set the state of the object below the top of the stack, if it is one of a checkpoint."""
        kind = type(self.stack[-2])
        if (kind.__module__, kind.__name__) not in STATEFUL:
            raise InputError(f"it sets the state of a {kind.__name__}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return enumeration_member
        if (module, name) not in ALLOWED:
            raise InputError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class PlainReader(dcp.FileSystemReader):
    """The library's reader, which unpickles anything in .metadata, with PlainUnpickler instead."""

    def read_metadata(self, *args, **kwargs):
        content = read_file(Path(self.path) / ".metadata")
        metadata = PlainUnpickler(io.BytesIO(content)).load()
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise InputError(f"it names {stored.relative_path!r}, which is outside")
        metadata.storage_meta.load_id = self.load_id
        check_coverage(metadata)
        return metadata

    def _slice_file(self, file, sinfo):
        """An entry of a shard, which is a zip archive; its checksums (CRC-32) are compared."""
        file.seek(sinfo.offset)
        entry = io.BytesIO(file.read(sinfo.length))
        try:
            with zipfile.ZipFile(entry) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            damaged = error
        if damaged:
            raise InputError(f"{sinfo.relative_path} is damaged ({damaged})")
        entry.seek(0)
        return entry


def check_coverage(metadata):
    """Refuse metadata whose chunks do not cover each tensor exactly once."""
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        boxes = [list(zip(chunk.offsets, chunk.sizes)) for chunk in entry.chunks]
        inside = all(
            begin >= 0 and length >= 0 and begin + length <= size
            for box in boxes
            for (begin, length), size in zip(box, entry.size)
        )
        volume = sum(math.prod(length for _, length in box) for box in boxes)
        apart = all(
            any(one[0] + one[1] <= two[0] or two[0] + two[1] <= one[0] for one, two in zip(*pair))
            for pair in itertools.combinations([box for box in boxes if box], 2)
        )
        if not inside or volume != math.prod(entry.size) or not apart:
            raise InputError(f"its chunks do not cover {name}")


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
        write_checksums(partial, [partial / ".metadata"])
        sync(partial)
        os.replace(partial, stage / f"checkpoint-{step}")
        sync(stage)
        remove_old()

    on_rank_0(make_room)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINED)
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
        for file in folder.iterdir():
            if file.is_symlink() or not file.is_file():
                raise InputError(f"{file.name} is a link, folder, pipe or device")
        check_files(folder)
        reader.read_metadata()  # here, because the library prints a traceback and tries other files
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder}: its .metadata is damaged ({reason}); {remedy}")
    model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": model_state, "optimizer": optimizer_state}
    transfer(dcp.load, state, folder, remedy, storage_reader=reader, planner=PlainPlanner())
    try:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED,
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
    kept = []
    for line, row in read_log(log) if is_plain(log) else []:
        if row["stage"] != stage.name or row["step"] < step:
            kept.append(line)
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
