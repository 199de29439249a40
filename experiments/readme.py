"""Run the README's commands as written, in a fresh clone and a fresh virtual environment, and paste what they print into it.

    python experiments/readme.py                    those of indented blocks and of marks, in order; on two cores they take most of an hour
    python experiments/readme.py sorting 'train.py$'   those in which one of these regular expressions is found, and what is installed

Output stands in README.md between `<!-- COMMAND -->` and `<!-- end -->`: the last table that the command printed, its commit and seconds. Where
commands speak of FOLDER and questions.jsonl they get the first round of `python train.py` and twenty questions of the task; --plan is added where they
want eight GPUs. A command finds what those before it left: the second `train.py` a finished run. Tests are left to `.ci/run`, the examples of
"Fork it" that no mark names to tests/test_fork.py.
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
MARK = re.compile(r"(<!-- ((?:python|torchrun) .*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands(text: str) -> list[str]:
    """Of the indented blocks and of the marks, each once, in order."""
    found = re.findall(r"^    ((?:pip|python|torchrun) (?:.*\\\n)*.*)$|<!-- ((?:python|torchrun) .*?) -->", text, re.MULTILINE)
    return [command for command in dict.fromkeys(re.sub(r"\\\n *", "", block or mark) for block, mark in found) if "pytest" not in command]


def last_table(printed: str) -> list[str]:
    """From the last line that names the columns on."""
    lines = printed.rstrip().split("\n")
    return lines[max((place for place, line in enumerate(lines) if line.startswith(("stage ", "strategy "))), default=len(lines) - 1):]


def prepare(folder: Path, text: str) -> dict:
    """A clone, an environment, and the files that the commands speak of; returns the environment's variables."""
    subprocess.run(["git", "clone", "-q", ROOT, folder / "svpo"], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    for name, code in re.findall(r"`python (\w+)\.py[^`]*`:\n\n```python\n(.*?)```", text, re.DOTALL):
        (folder / "svpo" / f"{name}.py").write_text(code)
    (folder / "svpo" / "questions.jsonl").write_text("".join(json.dumps({"question": f"{n % 7}+{n % 5}*2-1", "answer": str((n % 7 + n % 5 * 2 - 1) % 7), "id": str(n)}) + "\n"
                                                             for n in range(20)))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["pip", "install", "-q", "torch==2.13.0"], env=variables, check=True)  # the range alone may pull gigabytes of CUDA
    return variables


def main():
    words, text = sys.argv[1:], (ROOT / "README.md").read_text()
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if subprocess.run(["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout:
        sys.exit("commit first: what is run is the last commit")
    failed = []
    with tempfile.TemporaryDirectory() as name:
        variables = prepare(Path(name), text)
        for command in commands(text):
            if words and not any(re.search(word, command) for word in words) and not command.startswith("pip"):
                continue
            line = command.replace("FOLDER", "runs/arithmetic-seed0/round1") + (" --plan" if "--nproc-per-node 8" in command else "")
            begin = time.perf_counter()
            done = subprocess.run(line, shell=True, cwd=Path(name) / "svpo", env=variables, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            if "--figures" in line and "pip install matplotlib" in done.stderr:  # as the README says
                subprocess.run(["pip", "install", "-q", "matplotlib"], env=variables, check=True)
                done = subprocess.run(line, shell=True, cwd=Path(name) / "svpo", env=variables, capture_output=True, text=True)
            table = last_table(done.stdout)
            print(f"$ {line}\n    exit status {done.returncode}, {seconds:.0f} s", *table, *(done.stderr.rstrip().split("\n")[-3:] if done.returncode else []), sep="\n    ", flush=True)
            failed += [command] if done.returncode else []
            if not done.returncode:
                block = "\n".join(["", *("    " + row for row in table), f"    (commit {commit}, {seconds:.0f} s)", "", ""])
                now = (ROOT / "README.md").read_text()
                (ROOT / "README.md").write_text(MARK.sub(lambda match: match[1] + block + match[3] if match[2] == command else match[0], now))
    sys.exit("failed: " + "; ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
