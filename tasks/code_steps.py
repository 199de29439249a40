"""Solutions whose steps are XML, with code that runs (AlphaMath, appendix).

A step is `<step>` ... `</step>` with text in `<p>`, code in `<code>`, and in `<output>` what the
code printed, which the model does not write. If a limit stopped the code, the tag says which:
`<output stopped="time">`. What code prints cannot look like a tag.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tasks import sandbox

STEP = re.compile(r".*?</step>|.+\Z", re.DOTALL)
OUTPUT = re.compile(r'\s*<output(?: stopped="([\w ]+)")?>')
TAG = re.compile(r"<\s*/?\s*(?:step|p|code|output|think)\b", re.IGNORECASE)
FENCE = re.compile(r"\A\s*```\w*\n|```\s*\Z")  # Markdown's marks around code
SHOWN = 2000  # characters of output that a solution can see
CLOSING = 16  # tokens that are left for the end of a step after its output


def split_xml(solution: str) -> list[list[tuple[str, bool]]]:
    """The steps of a worked solution, each a list of (text, whether the model is to write it)."""
    steps = []
    for step in STEP.findall(solution.strip()):
        if not step.strip():
            continue
        parts = []
        place = 0
        for _, _, begin, end in find_blocks(step):
            if begin < end:
                parts += [(step[place:begin], True), (step[begin:end], False)]
                place = end
        parts.append((step[place:], True))
        steps.append([(text, written) for text, written in parts if text])
    return steps


def find_blocks(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Each block of code, the limit that stopped it, and where its output begins and ends.

    The limit is "" for none; the output has its tags, and is empty where there is none.
    """
    last = text.rfind("</output>")
    place = 0
    while True:
        start = text.find("<code>", place)
        end = text.find("</code>", start) if start >= 0 else -1
        if end < 0:
            return
        code = text[start + len("<code>") : end]
        begin = place = end + len("</code>")
        limit = ""
        opened = OUTPUT.match(text, begin)
        if opened and opened.end() <= last:
            limit = opened[1] or ""
            place = text.find("</output>", opened.end()) + len("</output>")
            place += text[place : place + 1] == "\n"
        yield code, limit, begin, place


def ends_code(text: str, before: str) -> bool:
    """Whether the newest token closes a block of code; `before` is the text without that token."""
    return "<code>" in text and text.count("</code>") > before.count("</code>")


def run_last_block(solution: str) -> tuple[str, str]:
    """What the last block of code of a partial solution prints, shortened, and what stopped it.

    The blocks before it run again first, except those that a limit stopped. A failure of the
    sandbox counts as a limit, "failure": it costs this block, not the search.
    """
    blocks = [(FENCE.sub("", code), limit) for code, limit, _, _ in find_blocks(solution)]
    if not blocks:  # </code> without <code>
        return "", ""
    earlier = [code for code, limit in blocks[:-1] if not limit]
    try:
        printed, limit = sandbox.run([*earlier, blocks[-1][0]])
    except OSError as error:
        print(f"a block of code was not run: {error}", flush=True)
        return "", "failure"
    return printed.strip()[:SHOWN].strip(), limit


def check_sandbox():
    """OSError, which says why, where code cannot be run."""
    if sandbox.run(["6 * 7"]) != ("42\n", ""):
        raise OSError("the sandbox does not compute 6 * 7")


def run_code(solutions: list[str]) -> list[tuple[str, str]]:
    """What `run_last_block` finds for each partial solution, which ends with a block of code."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(min(16, max(1, cores))) as pool:
        return list(pool.map(run_last_block, solutions))


def output_tokens(tokenizer, solutions: list[str], room: list[int]) -> list[list[int]]:
    """The tokens of the output to add to each partial solution, which ends with code.

    `tokenizer` is a data.StepTokenizer, and `room` the tokens that are left in each step. Output
    is cut where there is no room for it and for the end of the step.
    """
    different = list(dict.fromkeys(solutions))
    outputs = dict(zip(different, run_code(different)))
    tokenizer.tokenizer.encode_special_tokens = True  # output is text, whatever it looks like
    found = []
    for solution, left in zip(solutions, room):
        printed, limit = outputs[solution]
        printed = without_tags(tokenizer, printed)
        tag = f'<output stopped="{limit}">\n' if limit else "<output>\n"
        head = tag if solution.endswith("\n") else "\n" + tag
        tail = "\n</output>\n" if printed else "</output>\n"
        ids = tokenizer.encode(head + printed + tail)
        if len(ids) > left - CLOSING:
            start = tokenizer.encode(head)
            end = tokenizer.encode(tail)
            fitting = max(0, left - CLOSING - len(start) - len(end))
            ids = start + tokenizer.encode(printed or " ")[:fitting] + end
        found.append(ids)
    tokenizer.tokenizer.encode_special_tokens = False
    return found


def without_tags(tokenizer, printed: str) -> str:
    """What code printed, changed where its tokens would decode to a tag.

    The decoded tokens count: a tokenizer that normalises makes "<" of other characters. Special
    tokens among them may be shown or not, and none may end the text. If "<" with a backslash makes
    a tag, too, only letters, digits and a few signs are left.
    """
    plain = re.sub(r"[^A-Za-z0-9\s.,:;+*/=()-]", "?", printed)
    for text in (printed, printed.replace("<", "<\\"), plain):
        ids = tokenizer.encode(text or " ")
        decoded = [
            tokenizer.tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)
        ]
        if not any(map(TAG.search, decoded)) and not set(ids) & set(tokenizer.eos_ids):
            return text
    return ""
