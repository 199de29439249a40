"""The scripts of experiments/: rows that can run, tables made of what was measured."""

import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from data import RECIPES, SourceConfig
from eval import AnswerConfig, EvalConfig
from experiments import real
from mcts import SearchConfig, TreesConfig
from support.files import read_json
from support.flags import InputError, parse_args
from svpo import LossConfig
from train import RunConfig, TrainConfig

sys.path.insert(0, str(ROOT / "experiments"))
import readme  # noqa: E402
import results  # noqa: E402

EVERY_ROW = """
import sys
sys.path[:0] = sys.argv[1:]
import run
from pathlib import Path
small = ["--sft-questions", "20", "--search-questions", "5", "--valid-questions", "2"]
small += ["--test-limit", "2"]
for table, rows in run.TABLES.items():
    for row, flags in rows.items():
        words = list(flags or [])
        words = words[2:] if words[:1] == ["--size"] else words
        words = [] if words == ["samples"] else words
        job, splits = run.configure(0, Path("x"), words + small)
        assert set(job.run.__dict__) and len(splits["test"]) == 2, row
print("all")
"""


def test_every_row_names_flags_that_exist(tmp_path):
    """Catches a row of a table that would end with an error after hours of others.

    It runs in a process of its own: run.py changes the size of the tiny model.
    """
    command = [sys.executable, "-c", EVERY_ROW, str(ROOT), str(ROOT / "experiments")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("all\n"), done.stderr


def test_every_piece_names_flags_that_exist(tmp_path):
    """Catches a piece of real.py that would end with an error after hours of others."""
    config = SimpleNamespace(out=tmp_path, model=tmp_path, data_dir=tmp_path)
    scripts = {
        "train.py": (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig),
        "mcts.py": (SourceConfig, TreesConfig, SearchConfig),
        "eval.py": (SourceConfig, EvalConfig, SearchConfig, AnswerConfig),
    }
    names = []
    for name, command in real.pieces(config):
        names.append(name)
        script, *words = command.split()
        if script in scripts:
            parse_args("", scripts[script], words, recipes=RECIPES)
    assert len(set(names)) == len(names) > 100


@pytest.mark.parametrize("line", ["time.sleep(30)", "sys.exit(3)"])
def test_pieces_go_on_where_they_stopped(tmp_path, monkeypatch, capfd, line):
    """Catches pieces that run twice, one that is cut off or fails and counts as done, and a stop
    that takes no notice of the minutes."""
    monkeypatch.setattr(real, "cut_questions", lambda folder, data_dir: None)
    script = tmp_path / "piece.py"
    named = [(name, f"{script} {name}") for name in ("one", "two")]
    monkeypatch.setattr(real, "pieces", lambda config: named)
    config = SimpleNamespace(out=tmp_path / "out", data_dir=tmp_path, minutes=0.1, tiny=False)
    script.write_text(f"import sys, time\nprint('ran', sys.argv[1])\nif 'two' in sys.argv: {line}")
    if "exit" in line:
        with pytest.raises(InputError, match="ended with status 3"):
            real.run(config)
    else:
        real.run(config)
        assert capfd.readouterr().out.endswith("run the same command again\n")
    script.write_text("import sys\nprint('ran again', sys.argv[1])")
    config.minutes = 1
    real.run(config)
    printed = capfd.readouterr().out
    assert "ran again two\n" in printed and "ran again one" not in printed
    done = read_json(config.out / "done.json")
    assert [piece["done"] for piece in done.values()] == [True, True]


def measured() -> list[list[dict]]:
    return [results.read(f"{name}.jsonl") for name in ("results", "why", "real", "ladder")]


def sections() -> dict[str, list[str]]:
    """The lines of each section of RESULTS.md, by its heading."""
    parts = (ROOT / "RESULTS.md").read_text().split("\n## ")[1:]
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


def test_tables_are_means_over_seeds():
    """Catches figures that are not those of results.jsonl, and rows that are lost."""
    rows = measured()[0]
    for name in {row["table"] for row in rows}:
        mine = [row for row in rows if row["table"] == name]
        lines = results.measured_table(name, rows).lines
        if name == "scale":  # a line a size
            assert [line[0] for line in lines] == list(results.SIZES)
            continue
        names = list(dict.fromkeys(row["row"] for row in mine))
        assert [line[0] for line in lines] == names
        first = [100 * row["figures"]["greedy"] for row in mine if row["row"] == names[0]]
        assert lines[0][1].startswith(f"{statistics.fmean(first):.1f} ")
    assert len({(row["table"], row["row"], row["seed"]) for row in rows}) == len(rows)


def test_files_hold_what_was_measured():
    """Catches tables in RESULTS.md and experiments/tables.md that were typed, are older than the
    JSONL files, or that results.py no longer makes."""
    for path, blocks in (
        (ROOT / "RESULTS.md", results.short_blocks(*measured())),
        (ROOT / "experiments" / "tables.md", results.full_blocks(*measured())),
    ):
        text = path.read_text()
        for name, content in blocks.items():
            assert f"<!-- {name} -->\n{content}\n<!-- end -->" in text, f"{path.name}: {name}"
        pasted = len(readme.MARK.findall(text))  # by experiments/readme.py
        assert text.count("<!-- end -->") == len(blocks) + pasted, path.name


def test_results_md_is_short():
    """Catches a summary, tables or lists in RESULTS.md that grow beyond what a reader takes in."""
    found = sections()
    summary = [line for line in found.pop("Summary") if line]
    assert len(summary) <= 10 and all(line.startswith("- ") for line in summary)
    assert [heading.split(".")[0] for heading in found] == [str(n) for n in range(1, 11)]
    for heading, lines in found.items():
        rows = [line for line in lines if line.startswith("|")]
        assert sum(line.startswith("|---") for line in rows) == 1, heading
        assert max(line.strip("|").count("|") + 1 for line in rows) <= 5, heading
        assert sum(line.startswith("- ") for line in lines) <= 3, heading


def test_sections_link_to_their_full_tables():
    """Catches links to headings of experiments/tables.md that were renamed."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / "experiments" / "tables.md").read_text(), re.M)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for heading, lines in sections().items():
        links = re.findall(r"\(experiments/tables\.md#([\w-]+)\)", "\n".join(lines))
        assert heading == "Summary" or len(links) == 1 and links[0] in anchors, heading


def test_sections_without_jsonl_repeat_the_full_tables():
    """Catches figures of sections 7 to 9 that are not those of experiments/tables.md."""
    full = set(re.findall(r"\d+\.\d+", (ROOT / "experiments" / "tables.md").read_text()))
    for heading, lines in sections().items():
        if heading[0] in "789":
            found = set(re.findall(r"\d+\.\d+", "\n".join(lines)))
            assert found and found <= full, f"{heading}: {found - full}"
