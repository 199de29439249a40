"""Prompts in the chat template of a model's folder, rendered as transformers does."""

import contextlib
import json
import resource
import signal
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from support.files import read_json, read_text
from support.flags import InputError
from support.tokenizer_files import class_defaults, named_tokens, read_settings

ANSWER = "svpo-answer"  # stands for an assistant's message
Messages = list[dict[str, str]]
SECONDS = 5  # that a template may take
MEMORY = 2**30  # bytes that it may take
LONGEST = 10**6  # characters that it may write, beside the messages (which it may repeat)


def template_text(folder: Path, settings: dict) -> str:
    """The template called "default", or the only one.

    chat_template.jinja and additional_chat_templates/NAME.jinja go before chat_template of
    tokenizer_config.json, which may be a list of named ones. chat_template.json comes last.
    """
    files = {"default": folder / "chat_template.jinja"}
    extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files |= {file.stem: file for file in extra}
    found = {name: read_text(file) for name, file in files.items() if file.exists()}
    template = found or settings.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        items = [item for item in template if isinstance(item, dict)]
        template = {str(item.get("name")): item.get("template") for item in items}
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise InputError(f"--chat: {folder} has no default chat template, only {names}")
        template = template["default"]
    if not isinstance(template, str):
        raise InputError(
            f"--chat: {folder} has neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json"
        )
    return template


def make_environment():
    """What templates may use, in jinja2's sandbox: that of transformers."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks what the assistant writes."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def fail(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment


def renderer(folder: Path) -> Callable[[Messages, bool], str]:
    """A function that renders messages, with or without where the assistant begins to write."""
    settings = read_settings(folder)
    template = template_text(folder, settings)
    special = named_tokens(folder, class_defaults(settings) | settings)
    environment = make_environment()

    def render(messages: Messages, prompt: bool) -> str:
        try:
            with bounded():
                text = environment.from_string(template).render(
                    messages=messages,
                    add_generation_prompt=prompt,
                    tools=None,
                    documents=None,
                    **special,
                )
            if len(text) > LONGEST + 2 * sum(len(message["content"]) for message in messages):
                raise ValueError(f"it writes {len(text)} characters")
            return text
        except Exception as error:  # a template may fail in any way
            reason = f"{type(error).__name__}: {str(error) or 'no reason given'}"
            raise InputError(f"--chat: the chat template of {folder} fails: {reason}")

    return render


@contextlib.contextmanager
def bounded():
    """What runs inside has SECONDS (in the main thread) and MEMORY bytes more than are in use."""

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {SECONDS} s")

    timed = threading.current_thread() is threading.main_thread()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if timed:
        handler = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        fixed = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([most, *fixed]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)


def chat_template(folder: Path) -> Callable[[str], str]:
    """A function that renders a user's message, up to where the assistant begins to write.

    A template that writes the date (strftime_now) writes that of the day, so its prompts differ
    from day to day. InputError if the folder has no template or the template fails.
    """
    render = renderer(folder)
    return lambda text: render([{"role": "user", "content": text}], True)


def answer_end(folder: Path) -> str:
    """What the chat template writes after an assistant's message; empty if it renders none."""
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = renderer(folder)(turns, False)
    except InputError:
        return ""
    _, found, after = text.rpartition(ANSWER)
    return after if found else ""
