"""Files that appear whole or not at all, locks, and the configuration kept beside the results."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from support.flags import InputError, flag_name
from support.ranks import rank

LOCKS = {}  # file -> handle of each lock that this process holds


def read_json(file: Path) -> dict:
    """The JSON object in a file; InputError if there is none."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file")
    return json_object(content, str(file))


def json_object(content: str | bytes, where: str) -> dict:
    """The object that a text holds; InputError, which begins with `where`, for anything else."""
    return as_object(parse_json(content, where), where)


def parse_json(content: str | bytes, where: str):
    """The value of a text in JSON; InputError, which begins with `where`, if it is not valid."""
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})")


def as_object(value, where: str) -> dict:
    """A value that must be an object; InputError, which begins with `where`, if it is not."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def sync(file: Path):
    """Wait until the disk holds a file, or the entries of a folder."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(file: Path, write: Callable[[Path], None]):
    """Let `write` fill another file, sync it and rename it: `file` appears whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        sync(partial)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be written ({reason})")
    os.replace(partial, file)
    sync(file.parent)


def write_json(file: Path, value: dict):
    """Write a JSON file that appears whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    publish(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def append(file: Path, text: str):
    """Add a line to a file."""
    try:
        with open(file, "ab", buffering=0) as out:
            left = memoryview(text.encode())
            while left:
                left = left[out.write(left) :]
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror}); the lines before this one are whole, "
            "run the same command again to resume"
        )


def hold(file: Path):
    """Lock a file for as long as this process lives, so that no other process writes beside it.

    Only rank 0 does. InputError names the process that holds the lock.
    """
    if rank() or file.resolve() in LOCKS:
        return
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(handle, 20).decode(errors="replace") or "?"
        raise InputError(f"{file.parent}: process {owner} is still writing here; stop it first")
    LOCKS[file.resolve()] = handle
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def head_commit() -> str:
    """The commit of this code; empty if git or its folder is missing."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def digest(value) -> str:
    """A hash of something that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def keep_config(
    file: Path, configs: tuple, free: tuple, identity: dict[str, str], write: bool = True, **more
):
    """Store the fields of the dataclasses in `configs`, or compare them with the stored ones.

    Fields in `free` may differ; those that do are printed and stored. A field that is not stored
    had its default. `identity` has a hash of each thing that the fields only name: its questions,
    weights and so on. InputError names the fields and things that differ and must not; `more`
    holds further entries.
    """
    wanted = {type(config).__name__: dataclasses.asdict(config) for config in configs}
    if not file.exists() and write:
        write_json(file, {**wanted, "identity": identity, **more})
    stored = read_json(file) if file.exists() else {**wanted, "identity": identity}
    different = []
    changed = []
    for config in configs:
        part = type(config).__name__
        known = stored.get(part)
        known = known if isinstance(known, dict) else {}
        for item in dataclasses.fields(config):
            name, value = item.name, wanted[part][item.name]
            before = known.get(name, item.default)
            if before != value:
                found = changed if name in free else different
                found.append(f"{flag_name(name)} {before!r} -> {value!r}")
    if different:
        raise InputError(
            f"{file} was created with a different configuration: {', '.join(different)}; "
            "choose a different --out"
        )
    known = stored.get("identity")
    known = known if isinstance(known, dict) else {}
    others = [name for name, mark in identity.items() if known.get(name, mark) != mark]
    if others:
        raise InputError(
            f"{file} was created with other {' and '.join(others)} under the same names; choose a "
            "different --out"
        )
    if changed and write:
        write_json(file, {**stored, **wanted})
        print(f"{file}: from here on with {', '.join(changed)}")
