"""Files that appear whole or not at all, one writer at a time, and the configuration that is kept beside what a command writes."""
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Callable

from safetensors import SafetensorError

from support.flags import InputError


def read_json(path: Path) -> dict:
    """The JSON object in a file; InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})")
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is wanted, not {type(value).__name__}")
    return value


def settle(path: Path):
    """Have the disk hold a file, or a folder's entries, before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, write: Callable[[Path], None]):
    """Have a file written aside, synced and renamed: it appears whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        settle(aside)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")
    os.replace(aside, path)
    settle(path.parent)


def append(path: Path, text: str):
    """Add a line to a file."""
    try:
        with open(path, "ab", buffering=0) as file:
            line = memoryview(text.encode())
            while line:
                line = line[file.write(line):]
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); what stands there is whole, and the same command goes on from it")


HELD = {}  # lock files of this process


def hold(path: Path):
    """Keep other processes away from what this one writes, for as long as it lives; only rank 0 asks."""
    if int(os.environ.get("RANK", 0)) or path.resolve() in HELD:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{path.parent}: process {os.read(handle, 20).decode(errors='replace') or '?'} is still writing here; end it first")
    HELD[path.resolve()] = handle
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def head_commit() -> str:
    """The commit of this code; nothing where git or its folder is missing."""
    command = ["git" if shutil.which("git") else "true", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write_json(path: Path, value: dict):
    """Write a JSON file that appears whole or not at all."""
    publish(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def keep_config(path: Path, stages: tuple, free: tuple, write: bool = True, **more):
    """Store the stages' configuration, or check that it equals the stored one but for the `free` fields."""
    config = {type(stage).__name__: dataclasses.asdict(stage) for stage in stages}
    if not path.exists() and write:
        write_json(path, {**config, **more})
    stored = read_json(path) if path.exists() else config
    different = [f"--{name.replace('_', '-')} {stored.get(part, {}).get(name)!r} -> {value!r}"
                 for part, fields in config.items() for name, value in fields.items()
                 if name not in free and stored.get(part, {}).get(name) != value]
    if different:
        raise InputError(f"{path} is of another configuration: {', '.join(different)}; choose another --out")
    if stored.get("questions", more.get("questions")) != more.get("questions"):
        raise InputError(f"{path} is of other questions than there are now; choose another --out")
