"""The command line: dataclass fields become flags, and bad input ends a command with one line."""

import argparse
import dataclasses
import signal
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

USAGE = (
    "%(prog)s [--flag value ...]; N is a whole number, X a number, S text; "
    "flags without a value are switches, turned off with --no-"
)
METAVARS = {int: "N", float: "X"}
PANIC = "PanicException"  # of a library in Rust (tokenizers); it is no Exception


class InputError(ValueError):
    """Bad input from the user. The commands print it as one line and end with status 2."""


@dataclass(frozen=True)
class Recipe:
    """Defaults that replace those of the dataclass fields if `applies(flags)` is true."""

    name: str
    defaults: dict[str, object]
    applies: Callable[[dict], bool]


def flag(default, help: str, least=None, choices=None, many=False):
    """A dataclass field that becomes a command-line flag.

    `least` is the smallest value accepted and `choices` are the only ones. With `many`, several
    words are joined by spaces.
    """
    metadata = {"help": help, "least": least, "choices": choices, "many": many}
    return field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """The flag of a field: --max-depth for max_depth."""
    return "--" + field_name.replace("_", "-")


def parse_args(
    description: str,
    configs: tuple,
    argv: list[str],
    required: tuple = (),
    recipes: tuple[Recipe, ...] = (),
) -> tuple:
    """Parse one flag for each field of each dataclass in `configs`.

    The defaults of `recipes` that apply replace the fields' own, one recipe after the other.
    Returns one instance of each dataclass, in their order. Raises InputError if a flag is unknown,
    a required one is missing, or a value is not acceptable.
    """
    fields = {item.name: item for config in configs for item in dataclasses.fields(config)}
    given = vars(make_parser(description, configs, required, recipes).parse_args(argv))
    for name, item in fields.items():
        if item.metadata["many"] and name in given:
            given[name] = " ".join(given[name])
    values = {name: item.default for name, item in fields.items()} | given
    for recipe in recipes:
        if recipe.applies(values):
            known = {name: value for name, value in recipe.defaults.items() if name in fields}
            values |= known | given
    check_values(fields, values)
    if values.get("dtype") == "auto":
        values["dtype"] = "bfloat16" if values.get("plan") else fast_dtype(values["device"])
    return tuple(
        config(**{item.name: values[item.name] for item in dataclasses.fields(config)})
        for config in configs
    )


def make_parser(description: str, configs: tuple, required: tuple, recipes: tuple):
    """An argparse parser with one group of flags for each dataclass; it raises InputError."""

    def fail(message):
        raise InputError(message)

    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=100)
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=description.partition("Dimension key:")[0].rstrip(),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=layout,
    )
    parser.error = fail
    for config in configs:
        first_line = config.__doc__.partition("\n")[0]
        group = parser.add_argument_group(config.__name__, first_line)
        for item in dataclasses.fields(config):
            text = help_text(item, item.name in required, recipes).replace("%", "%%")
            needed = item.name in required
            group.add_argument(flag_name(item.name), required=needed, help=text, **kind_of(item))
    return parser


def help_text(item: dataclasses.Field, required: bool, recipes: tuple) -> str:
    """The help of a field, with its default and, where they differ, those of the recipes."""
    text = item.metadata["help"]
    shown = " ".join(item.default) if item.type is tuple else item.default
    defaults = [] if shown == "" else [str(shown)]
    for recipe in recipes:
        other = recipe.defaults.get(item.name, item.default)
        defaults += [f"{recipe.name}: {other}"] if other != item.default else []
    if defaults:
        text += f" ({'; '.join(defaults)})"
    return text + " (required)" if required else text


def kind_of(item: dataclasses.Field) -> dict:
    """The keyword arguments of add_argument that follow from a field's type."""
    if item.type is tuple or item.metadata["many"]:
        return {"nargs": "+", "metavar": "S"}
    if item.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    choices = item.metadata["choices"]
    metavar = None if choices else METAVARS.get(item.type, "S")
    return {"type": item.type, "choices": choices, "metavar": metavar}


def check_values(fields: dict[str, dataclasses.Field], values: dict):
    """Refuse values under their least one, and devices that this machine does not have."""
    for name, item in fields.items():
        least = item.metadata["least"]
        if least is not None and not values[name] >= least:
            raise InputError(f"{flag_name(name)} must be at least {least}, not {values[name]}")
    if "device" not in values:
        return
    try:
        device = torch.device(values["device"])
    except RuntimeError as error:
        raise InputError(f"--device {values['device']}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--device {values['device']}: this machine has {count} CUDA devices")


def fast_dtype(device: str) -> str:
    """bfloat16 where a device has units for it: CUDA since Ampere, CPUs with AMX or AVX512-BF16."""
    kind = torch.device(device).type
    if kind == "cuda":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        units = kind == "cpu" and (amx or avx)
    return "bfloat16" if units else "float32"


def visible(text: str) -> str:
    """A text that is safe to print: control and direction characters are shown as numbers."""

    def shown(letter: str) -> str:
        steers = unicodedata.category(letter) in ("Cc", "Cf", "Cs") and letter not in "\n\t"
        return f"\\x{ord(letter):02x}" if steers else letter

    return "".join(map(shown, text))


def run_command(main):
    """Run a command. Bad input ends it with one line on stderr and status 2, SIGINT with 130 and
    SIGTERM with 143."""

    def end(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, end)
    try:
        main()
    except KeyboardInterrupt as stop:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])
    except BaseException as error:
        line = explain(error)
        if not line:
            raise
        print(f"error: {visible(line)}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str:
    """The line that is printed instead of a traceback; empty if there is to be a traceback."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, (InputError, OSError, torch.OutOfMemoryError)):
        return first_line
    if isinstance(error, MemoryError) or "can't allocate memory" in first_line:
        return f"out of memory ({first_line})"
    if isinstance(error, RuntimeError) and dist.is_initialized() and "peer" in str(error):
        return "another rank has ended; run the same command again to resume"
    if type(error) is Exception or type(error).__name__ == PANIC:
        return f"the tokenizer fails ({first_line})"  # no other library raises these
    return ""
