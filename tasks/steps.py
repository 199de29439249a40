"""How a solution is written down as steps: lines, or the XML of code-using solutions; and prompts in a chat template.

XML (AlphaMath, appendix): a step is `<step>` ... `</step>` with text in `<p>`, code in `<code>` and what the code printed, which
the model does not write, in `<output>`.
"""
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.files import read_json
from support.flags import InputError

BLOCK = re.compile(r"<code>(.*?)</code>(\s*<output>.*?</output>\n?)?", re.DOTALL)  # a block of code, and its output
SHOWN = 2000  # characters of output that a solution can see


def split_xml(solution: str) -> list[list[tuple[str, bool]]]:
    """Steps of a worked solution in XML, each as (text, whether the model is to write it) in turn; outputs are not."""
    split = []
    for step in [step for step in re.findall(r".*?</step>|.+\Z", solution.strip(), re.DOTALL) if step.strip()]:
        split.append([])
        place = 0
        for match in BLOCK.finditer(step):
            if match[2]:
                split[-1] += [(step[place:match.start(2)], True), (match[2], False)]
                place = match.end()
        split[-1] += [(step[place:], True)]
    return [[(text, written) for text, written in step if text] for step in split]


def closed(tag: str, text: str, before: str) -> bool:
    """Whether the newest token closes a tag; `before` is the text without that token, which may hold more than the tag's end."""
    return text.count(f"</{tag}>") > before.count(f"</{tag}>")


def run_code(solutions: list[str]) -> list[str]:
    """What each partial solution prints that ends with a block of code, shortened, with no tag that could end it. Its earlier blocks
    run again before it, but those that a limit stopped."""
    from tasks import sandbox

    def one(solution: str) -> str:
        blocks = [(re.sub(r"\A\s*```\w*\n|```\s*\Z", "", code), output) for code, output in BLOCK.findall(solution)]
        if not blocks:  # </code> without <code>
            return ""
        printed, limit = sandbox.run([code for code, output in blocks[:-1] if "\n[stopped: " not in output] + [blocks[-1][0]])
        return (printed.strip()[:SHOWN].replace("</", "<\\/") + (f"\n[stopped: {limit}]" if limit else "")).strip("\n")
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(min(16, max(1, cores))) as pool:
        return list(pool.map(one, solutions))


def output_tokens(tokenizer, solutions: list[str], room: list[int]) -> list[list[int]]:
    """Tokens of the output to add to each partial solution, which ends with code; shortened where there is no room for them
    and for the end of the step."""
    outputs = dict(zip(dict.fromkeys(solutions), run_code(list(dict.fromkeys(solutions)))))
    tokenizer.tokenizer.encode_special_tokens, found = True, []  # what is printed is text, whatever it looks like
    for solution, left in zip(solutions, room):
        head, tail = "\n"[:not solution.endswith("\n")] + "<output>\n", "\n</output>\n"
        ids = tokenizer.encode(head + outputs[solution] + tail)
        if len(ids) > left - 16:
            start, end = tokenizer.encode(head), tokenizer.encode(tail)
            ids = start + tokenizer.encode(outputs[solution] or " ")[:max(0, left - 16 - len(start) - len(end))] + end
        found.append(ids)
    tokenizer.tokenizer.encode_special_tokens = False
    return found


def chat_template(folder: Path):
    """A function that renders a user's message in the folder's chat template, up to where the assistant begins to write.

    The template is the text of chat_template.jinja, or `chat_template` of tokenizer_config.json, rendered in jinja2's
    sandbox as transformers does; InputError where there is none or it fails.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(settings) if settings.exists() else {}
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
