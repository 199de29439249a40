"""Run the commands of README.md and docs/ as written, in a fresh clone, and paste their output.

    python experiments/readme.py                     all of them; most of an hour on two cores
    python experiments/readme.py sorting 'train.py$'  those that match one of these expressions

Commands stand in indented blocks and in marks. Output is pasted between `<!-- COMMAND -->` and
`<!-- end -->` of README.md, docs/ and experiments/tables.md: the last table that the command
printed, its commit and its seconds. FOLDER and questions.jsonl are the first round of the first
command and twenty questions of the task, labels.jsonl has two labelled solutions of each, and
solutions.jsonl a solution; --plan is added where a command wants eight GPUs. A command finds what
those before it left. The test command is left to .ci/run, and the hour-long one to its reader.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
PASTED = [*PAGES, "experiments/tables.md"]
COMMAND = r"(?:bash|python|torchrun) "
MARK = re.compile(rf"(<!-- ({COMMAND}.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(rf"^    ({COMMAND}(?:.*\\\n)*.*)$|<!-- ({COMMAND}.*?) -->", re.MULTILINE)
EXAMPLE = re.compile(r"`python [^`]*\b(\w+)\.py[^`]*`[^`]*:\n\n```python\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of indented blocks and of marks, each once, in order."""
    found = [block or mark for block, mark in BLOCK.findall(text)]
    lines = [re.sub(r"\\\n *", "", command) for command in found]
    return [line for line in dict.fromkeys(lines) if "pytest" not in line]


def last_table(printed: str) -> list[str]:
    """The lines from the last one that names the columns on; the last line if none does."""
    lines = printed.rstrip().split("\n")
    heads = [n for n, line in enumerate(lines) if line.startswith(("stage ", "strategy "))]
    return lines[heads[-1] if heads else len(lines) - 1 :]


def prepare(folder: Path) -> dict[str, str]:
    """Make a clone with the files that the commands speak of; returns environment variables."""
    clone = folder / "svpo"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for page in PAGES:
        for name, code in EXAMPLE.findall((ROOT / page).read_text()):
            (clone / f"{name}.py").write_text(code)
    rows, labels = [], []
    for number in range(20):
        first, second = number % 7, number % 5
        answer = (first + second * 2 - 1) % 7
        question = f"{first}+{second}*2-1"
        rows.append({"question": question, "answer": str(answer), "id": str(number)})
        for label, stated in ((True, answer), (False, (answer + 1) % 7)):
            steps = {"steps": [f"1*1=1 #### {stated}"], "labels": [label]}
            labels.append({"id": str(number), **steps})
    solved = [{"question": "1+2*2", "solution": "2*2=4 -> 1+4\n1+4=5 #### 5"}]
    for name, lines in (("questions", rows), ("labels", labels), ("solutions", solved)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (clone / f"{name}.jsonl").write_text(text)
    subprocess.run(["bash", "setup.sh"], cwd=clone, check=True)
    # figures need a package that the pages name beside their command
    pip = [clone / ".venv" / "bin" / "python", "-m", "pip", "install", "-q", "matplotlib"]
    subprocess.run(pip, check=True)
    variables = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    return {**variables, "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"}


def paste(command: str, rows: list[str]):
    """Put the output of a command between its marks."""
    block = "\n".join(["", *("    " + row for row in rows), "", ""])

    def replaced(match: re.Match) -> str:
        return match[1] + block + match[3] if match[2] == command else match[0]

    for page in PASTED:
        text = (ROOT / page).read_text()
        (ROOT / page).write_text(MARK.sub(replaced, text))


def run(command: str, clone: Path, variables: dict[str, str], commit: str) -> bool:
    """Run a command, print and paste what it printed; whether it succeeded."""
    line = command.replace("FOLDER", "runs/arithmetic-seed0/round1")
    line += " --plan" if "--nproc-per-node 8" in command else ""
    begin = time.perf_counter()
    done = subprocess.run(
        line, shell=True, cwd=clone, env=variables, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begin
    table = last_table(done.stdout)
    errors = done.stderr.rstrip().split("\n")[-3:] if done.returncode else []
    status = f"exit status {done.returncode}, {seconds:.0f} s"
    print(f"$ {line}", status, *table, *errors, sep="\n    ", flush=True)
    if not done.returncode:
        paste(command, [*table, f"(commit {commit}, {seconds:.0f} s)"])
    return not done.returncode


def main():
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(status, capture_output=True, text=True).stdout:
        sys.exit("commit first: what is run is the last commit")
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    failed = []
    with tempfile.TemporaryDirectory() as name:
        variables = prepare(Path(name))
        for command in commands("\n".join((ROOT / page).read_text() for page in PAGES)):
            wanted = not sys.argv[1:] or any(re.search(word, command) for word in sys.argv[1:])
            if not wanted or "--help" in command:
                continue
            if not run(command, Path(name) / "svpo", variables, head.stdout.strip()):
                failed.append(command)
    sys.exit("failed: " + "; ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
