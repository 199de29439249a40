"""Files that appear whole or not at all, locks, and the configuration kept beside the results."""

import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from support.flags import InputError, flag_name
from support.ranks import rank, world_size

SEAL = "blake2b"  # the field of an object that holds its hash
CHECKSUMS = "checksums.json"  # of the other files of a folder
CHECKED = {}  # file -> its size and time of change, when this process checked it
LOCKS = {}  # file -> handle of each lock that this process holds
UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # a file system cannot do it


def bytes_digest(content: bytes) -> str:
    """A hash of bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest(value) -> str:
    """A hash of something that JSON can hold."""
    return bytes_digest(json.dumps(value).encode())


def file_digest(file: Path) -> str:
    """A hash of a file's content."""
    mark = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        while block := content.read(2**22):
            mark.update(block)
    return mark.hexdigest()


def sealed(value: dict) -> dict:
    """An object with a hash of itself, which `unsealed` checks."""
    return {**value, SEAL: digest(value)}


def unsealed(value: dict, where: str) -> dict:
    """An object without its hash; InputError if it has one that is not its own."""
    value = dict(value)
    mark = value.pop(SEAL, None)
    if mark is not None and mark != digest(value):
        raise InputError(f"{where}: damaged, or changed; if you changed it, remove its {SEAL!r}")
    return value


def is_plain(file: Path) -> bool:
    """Whether there is such a file; InputError for a folder, pipe or device of that name.

    It may be a link to a file, as in the cache of huggingface-hub.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: a folder, pipe or device, not a file")
    return file.exists()


def read_file(file: Path) -> bytes:
    """What a file holds; InputError if there is none, or if it cannot be read."""
    if not is_plain(file):
        raise InputError(f"{file}: no such file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})")


def read_text(file: Path) -> str:
    """What a text file holds, in UTF-8; InputError as in `read_file`."""
    try:
        return read_file(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read ({error})")


def read_json(file: Path, shape: dict | None = None) -> dict:
    """The JSON object in a file; InputError if there is none, or if it is damaged or misshapen."""
    return json_object(read_file(file), str(file), shape)


def json_object(content: str | bytes, where: str, shape: dict | None = None) -> dict:
    """The object that a text holds, without its hash.

    InputError, which begins with `where`, for anything else, if the hash is not its own, and for
    fields that are not of this `shape` (`misfit`).
    """
    value = unsealed(as_object(parse_json(content, where), where), where)
    problem = misfit(value, shape or {}, "")
    if problem:
        raise InputError(f"{where}: {problem}")
    return value


def misfit(value, shape, name: str) -> str:
    """How a value differs from a shape; empty if it does not.

    A shape is a type (float takes whole numbers, too), an object with the shapes of the fields that
    it must have, a list of the shape of its items, of which there must be one, or a tuple of
    shapes, of which it must have one. For example {"answers": [{"accuracy": (float, NoneType)}]}.
    """
    if isinstance(shape, tuple):
        problems = [misfit(value, one, name) for one in shape]
        return "" if "" in problems else problems[0]
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds or value == []:
        names = {dict: "an object", list: "a list of items", str: "text", float: "a number"}
        return f"{name[1:] or 'it'} must be {names.get(kind, kind.__name__)}, not {value!r:.40}"
    parts = {}
    if isinstance(shape, dict):
        parts = {f"{name}.{key}": (value.get(key), part) for key, part in shape.items()}
    if isinstance(shape, list):
        parts = {f"{name}[{index}]": (part, shape[0]) for index, part in enumerate(value)}
    found = (misfit(*part, place) for place, part in parts.items())
    return next(filter(None, found), "")


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
    """Wait until the disk holds a file, or the entries of a folder, where it can say so."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (file.is_dir() and error.errno in UNKNOWN):
            raise
    finally:
        os.close(handle)


def check_output(file: Path, name: str, inputs: Iterable[str | Path] = ()):
    """Refuse to write over an input, over a link or what is no file, and into no folder.

    `name` is the flag of the output, for the message. Inputs that are not given are empty.
    """
    if file.is_symlink() or file.exists() and not file.is_file():
        raise InputError(f"{name} {file}: a link, folder, pipe or device, which is not replaced")
    for other in filter(None, inputs):
        if file.resolve() == Path(other).resolve():
            raise InputError(f"{name} {file}: this is an input, too, and is not written over")
    if not os.access(file.absolute().parent, os.W_OK):
        raise InputError(f"{name} {file}: its folder does not exist or cannot be written to")


def publish(file: Path, write: Callable[[Path], None]):
    """Let `write` fill another file, sync it and rename it: `file` appears whole or not at all."""
    check_output(file, "output")
    partial = file.with_name(file.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a link
        write(partial)
        sync(partial)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be written ({reason})")
    os.replace(partial, file)
    sync(file.parent)


def write_json(file: Path, value: dict, seal: bool = True):
    """Write a JSON file that appears whole or not at all, with a hash of its content (`sealed`)."""
    text = json.dumps(sealed(value) if seal else value, indent=1) + "\n"
    publish(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_lines(file: Path, rows: Iterable[dict]):
    """Write a JSONL file that appears whole or not at all, a line for each row as it comes."""

    def write(partial: Path):
        with open(partial, "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)

    publish(file, write)


def write_checksums(folder: Path, files: list[Path], **texts: str):
    """Write checksums.json: hashes of files, and of `texts` that are yet to be written."""
    sums = {str(file.relative_to(folder)): file_digest(file) for file in files}
    for name, text in texts.items():
        sums[name] = bytes_digest(text.encode())
    write_json(folder / CHECKSUMS, sums)


def check_files(folder: Path, names: list[str] | None = None):
    """Compare files with the folder's checksums.json, if it has one; by default all that it names.

    A process reads each file once. InputError for the first one that differs.
    """
    if not is_plain(folder / CHECKSUMS):
        return
    for name, mark in read_json(folder / CHECKSUMS).items():
        file = folder / name
        if names is not None and name not in names:
            continue
        if not is_plain(file):  # who needs it will say so
            continue
        state = file.stat()
        seen = (state.st_size, state.st_mtime_ns, mark)
        if CHECKED.get(file.resolve()) == seen:
            continue
        if file_digest(file) != mark:
            raise InputError(
                f"{file}: damaged, or changed since it was written; if you changed it, remove "
                f"{folder / CHECKSUMS}"
            )
        CHECKED[file.resolve()] = seen


def append(file: Path, text: str):
    """Add a line to a file."""
    check_output(file, "output")
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

    Each rank locks a file of its own (name-RANK), and rank 0 sees to it that no rank of an earlier
    run with more of them is left. InputError names the process that holds a lock.
    """
    mine = file.with_name(f"{file.name}-{rank()}") if rank() else file
    if mine.resolve() in LOCKS:
        return
    for other in file.parent.glob(glob.escape(file.name) + "-*"):
        number = other.name.removeprefix(f"{file.name}-")
        if not rank() and number.isdecimal() and int(number) >= world_size():
            os.close(lock(other))
    handle = lock(mine)
    LOCKS[mine.resolve()] = handle
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def lock(file: Path) -> int:
    """The handle of a file that is locked as long as this handle is open."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNKNOWN:
            print(f"{file}: there are no locks here; let no other process write to this folder")
            return handle
        owner = os.read(handle, 20).decode(errors="replace") or "?"
        os.close(handle)
        raise InputError(f"{file.parent}: process {owner} is still writing here; stop it first")
    return handle


def head_commit() -> str:
    """The commit of this code; empty if git or its folder is missing."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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
        known = as_object(stored.get(part, {}), f"{file}, {part}")
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
    known = as_object(stored.get("identity", {}), f"{file}, identity")
    others = [name for name, mark in identity.items() if known.get(name, mark) != mark]
    if others:
        raise InputError(
            f"{file} was created with other {' and '.join(others)} under the same names; choose a "
            "different --out"
        )
    if changed and write:
        write_json(file, {**stored, **wanted})
        print(f"{file}: from here on with {', '.join(changed)}")
