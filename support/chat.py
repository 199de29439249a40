"""Prompts in the chat template of a model's folder."""

import json
from collections.abc import Callable
from pathlib import Path

from support.files import read_json
from support.flags import InputError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def template_text(folder: Path, settings: dict) -> str:
    """chat_template.jinja, or chat_template of tokenizer_config.json, which may be a list."""
    file = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if file.exists():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(
            f"--chat: {folder} has neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json"
        )
    return template


def special_tokens(settings: dict) -> dict[str, str]:
    """The texts of the special tokens in tokenizer_config.json, which may be objects."""
    found = {name: settings[name] for name in SPECIAL if settings.get(name)}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in found.items()
    }


def chat_template(folder: Path) -> Callable[[str], str]:
    """A function that renders a user's message, up to where the assistant begins to write.

    Templates run in jinja2's sandbox, as in transformers. InputError if the folder has no template
    or the template fails.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    template = template_text(folder, settings)
    special = special_tokens(settings)

    def fail(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = fail  # no date: a prompt is the same every day
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )

    def render(text: str) -> str:
        try:
            return environment.from_string(template).render(
                messages=[{"role": "user", "content": text}],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **special,
            )
        except Exception as error:  # a template may fail in any way
            reason = f"{type(error).__name__}: {str(error) or 'no reason given'}"
            raise InputError(f"--chat: the chat template of {folder} fails: {reason}")

    return render
