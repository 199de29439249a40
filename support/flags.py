"""The command line: dataclass fields as flags, and how a command ends. Nothing of the method is here."""
import argparse
import dataclasses
import signal
import sys
import unicodedata
from dataclasses import field

import torch
import torch.distributed as dist


class InputError(ValueError):
    """Bad input from the user: the commands print it as one line and end with status 2."""


def visible(text: str) -> str:
    """A text for the terminal: what would steer it, control characters and marks of direction, is shown as its number."""
    return "".join(letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else f"\\x{ord(letter):02x}" for letter in text)


USAGE = "%(prog)s [--flag value ...]; N is a whole number, X a number, S text; those without a value are on, or off with --no-"


def flag(default, help: str, built_in=None, least=None, choices=None, many=False):
    """A dataclass field that becomes a command-line flag. `built_in` is its default for the built-in task, `least` the
    smallest value accepted, `choices` the only ones; with `many` several words are joined by spaces."""
    return field(default=default, metadata={"help": help, "built_in": default if built_in is None else built_in, "least": least,
                                            "choices": choices, "many": many})


def parse_args(description: str, stages: tuple, argv: list[str], required: tuple = ()) -> tuple:
    """One flag for each field of each stage's dataclass; returns one instance a stage, or raises InputError."""
    def fail(message):
        raise InputError(message)
    parser = argparse.ArgumentParser(usage=USAGE, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=120))
    parser.error = fail
    fields = {item.name: item for stage in stages for item in dataclasses.fields(stage)}
    for stage in stages:
        group = parser.add_argument_group(stage.__name__, stage.__doc__)
        for item in dataclasses.fields(stage):
            default, there = item.default, item.metadata["built_in"]
            shown = " ".join(default) if item.type is tuple else default
            text = item.metadata["help"] + (f" ({shown}" if shown != "" else "")
            text += (f"; built-in task: {there})" if there != default else ")") if shown != "" else ""
            text += " (required)" if item.name in required else ""
            kind = {"type": item.type, "choices": item.metadata["choices"], "metavar": None if item.metadata["choices"] else {int: "N", float: "X"}.get(item.type, "S")}
            kind = {"action": argparse.BooleanOptionalAction} if item.type is bool else kind
            kind = {"nargs": "+", "metavar": "S"} if item.type is tuple or item.metadata["many"] else kind
            group.add_argument("--" + item.name.replace("_", "-"), required=item.name in required,
                               help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    given |= {name: " ".join(given[name]) for name, item in fields.items() if item.metadata["many"] and name in given}
    from tasks.questions import is_built_in  # here, because tasks raise InputError
    task = "built_in" if is_built_in(given.get("data", fields["data"].default)) else None
    values = {name: given.get(name, item.metadata[task] if task else item.default) for name, item in fields.items()}
    for name, item in fields.items():
        if item.metadata["least"] is not None and not values[name] >= item.metadata["least"]:
            raise InputError(f"--{name.replace('_', '-')} must be at least {item.metadata['least']}, not {values[name]}")
    try:
        device = torch.device(values["device"])
    except RuntimeError as error:
        raise InputError(f"--device {values['device']}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {values['device']}: this machine has {torch.cuda.device_count()} CUDA devices")
    return tuple(stage(**{item.name: values[item.name] for item in dataclasses.fields(stage)}) for stage in stages)


def run_command(main):
    """Run a command; bad input is one line on stderr and exit status 2, SIGINT is status 130, SIGTERM 143."""
    def end(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, end)
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {visible((str(error).splitlines() or [type(error).__name__])[0])}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not dist.is_initialized() or "peer" not in str(error):
            raise
        print("error: another rank has ended; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])
