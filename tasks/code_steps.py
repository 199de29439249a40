"""Solutions whose steps are XML, with code that runs (AlphaMath, appendix).

A step is `<step>` ... `</step>` with text in `<p>`, code in `<code>`, and in `<output>` what the
code printed, which the model does not write.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

from tasks import sandbox

STEP = re.compile(r".*?</step>|.+\Z", re.DOTALL)
BLOCK = re.compile(r"<code>(.*?)</code>(\s*<output>.*?</output>\n?)?", re.DOTALL)
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
        for match in BLOCK.finditer(step):
            if match[2]:
                parts += [(step[place : match.start(2)], True), (match[2], False)]
                place = match.end()
        parts.append((step[place:], True))
        steps.append([(text, written) for text, written in parts if text])
    return steps


def ends_code(text: str, before: str) -> bool:
    """Whether the newest token closes a block of code; `before` is the text without that token."""
    return "<code>" in text and text.count("</code>") > before.count("</code>")


def run_last_block(solution: str) -> str:
    """What the last block of code of a partial solution prints, shortened.

    The blocks before it run again first, except those that a limit stopped. The output holds no tag
    that could end it.
    """
    blocks = [(FENCE.sub("", code), output) for code, output in BLOCK.findall(solution)]
    if not blocks:  # </code> without <code>
        return ""
    earlier = [code for code, output in blocks[:-1] if "\n[stopped: " not in output]
    printed, limit = sandbox.run([*earlier, blocks[-1][0]])
    shown = printed.strip()[:SHOWN].replace("</", "<\\/")
    return (shown + (f"\n[stopped: {limit}]" if limit else "")).strip("\n")


def run_code(solutions: list[str]) -> list[str]:
    """The output of each partial solution, which ends with a block of code."""
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
        head = "<output>\n" if solution.endswith("\n") else "\n<output>\n"
        tail = "\n</output>\n"
        ids = tokenizer.encode(head + outputs[solution] + tail)
        if len(ids) > left - CLOSING:
            start = tokenizer.encode(head)
            end = tokenizer.encode(tail)
            fitting = max(0, left - CLOSING - len(start) - len(end))
            ids = start + tokenizer.encode(outputs[solution] or " ")[:fitting] + end
        found.append(ids)
    tokenizer.tokenizer.encode_special_tokens = False
    return found
