"""How a solution is written down as steps: lines, or the XML of code-using solutions; and prompts in a chat template.

XML (AlphaMath, appendix): a step is `<step>` ... `</step>` with text in `<p>`, code in `<code>` and what the code printed, which
the model does not write, in `<output>`.
"""
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svpo import InputError

OUTPUT = re.compile(r"\s*<output>.*?</output>\n?", re.DOTALL)  # as `to_output` writes it, with the space before it
SHOWN = 2000  # characters of output that a solution can see


def split_xml(solution: str) -> list[list[tuple[str, bool]]]:
    """Steps of a worked solution in XML, each as (text, whether the model is to write it) in turn; outputs are not."""
    split = []
    for step in [step for step in re.findall(r".*?</step>|.+\Z", solution.strip(), re.DOTALL) if step.strip()]:
        split.append([])
        place = 0
        for match in OUTPUT.finditer(step):
            split[-1] += [(step[place:match.start()], True), (match[0], False)]
            place = match.end()
        split[-1] += [(step[place:], True)]
    return [[(text, written) for text, written in step if text] for step in split]


def to_output(text: str, printed: str, limit: str) -> str:
    """What follows `text`, which ends with a block of code: its output, shortened, with no tag that could end it."""
    printed = printed.strip()[:SHOWN].replace("</", "<\\/") + (f"\n[stopped: {limit}]" if limit else "")
    return "\n"[:not text.endswith("\n")] + f"<output>\n{printed.strip()}\n</output>\n"


def run_code(solutions: list[str]) -> list[str]:
    """The output to add to each partial solution that ends with a block of code; its earlier blocks run again before it."""
    from tasks import sandbox

    def one(solution: str) -> str:
        blocks = re.findall(r"<code>(.*?)</code>", OUTPUT.sub("", solution), re.DOTALL)
        return to_output(solution, *sandbox.run([re.sub(r"\A\s*```\w*\n|```\s*\Z", "", block).strip() for block in blocks]))
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, solutions))


def chat_template(folder: Path):
    """A function that renders a user's message in the folder's chat template, up to where the assistant begins to write.

    The template is the text of chat_template.jinja, or `chat_template` of tokenizer_config.json, rendered in jinja2's
    sandbox as transformers does; InputError where there is none or it fails.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path, settings = folder / "chat_template.jinja", {}
    if (folder / "tokenizer_config.json").exists():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {item.get("name"): item.get("template") for item in template}.get("default")
    if not isinstance(template, str):
        raise InputError(f"--chat: {folder} has neither chat_template.jinja nor a chat_template in tokenizer_config.json")
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in settings.items()
               if name in ("bos_token", "eos_token", "pad_token", "unk_token") and token}

    def fail(message):
        raise TemplateError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = fail  # but no date: a prompt does not change from day to day
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)

    def render(text: str) -> str:
        try:
            return environment.from_string(template).render(messages=[{"role": "user", "content": text}], add_generation_prompt=True,
                                                            tools=None, documents=None, **special)
        except Exception as error:  # a template may fail in any way
            raise InputError(f"--chat: the chat template of {folder} fails: {type(error).__name__}: {str(error) or 'no reason given'}")
    return render
