"""The scripts of experiments/: rows that can run, tables made of what was measured."""
import json
import statistics
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import results  # noqa: E402


def test_every_row_names_flags_that_exist(tmp_path):
    """Catches a row of a table that would end with an error after hours of others; in a process of its own, because run.py counts tokens
    in the driver."""
    import subprocess
    code = ("import sys; sys.path[:0] = sys.argv[1:]\nimport run\nfrom pathlib import Path\n"
            "for table, rows in run.TABLES.items():\n"
            "    for row, flags in rows.items():\n"
            "        words = (flags or [])[2 * (bool(flags) and flags[0] == '--size'):]\n"
            "        words = [] if words == ['samples'] else words\n"
            "        small = ['--sft-questions', '20', '--search-questions', '5', '--valid-questions', '2', '--test-limit', '2']\n"
            "        job, splits = run.configure(0, Path('x'), words + small)\n"
            "        assert set(job.run.__dict__) and len(splits['test']) == 2, row\n"
            "print('all')")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(ROOT / "experiments")], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("all\n"), done.stderr


def test_tables_are_means_over_seeds():
    """Catches figures that are not those of results.jsonl, and rows that are lost."""
    rows = [json.loads(line) for line in (ROOT / "experiments" / "results.jsonl").read_text().splitlines()]
    for name in {row["table"] for row in rows}:
        mine = [row for row in rows if row["table"] == name]
        lines = results.table(mine).splitlines()
        if name == "scale":  # a line a size
            assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == list(results.SIZES)
            continue
        names = list(dict.fromkeys(row["row"] for row in mine))
        assert [line.split(" | ")[0].strip("| ") for line in lines[2:2 + len(names)]] == names
        first = [100 * row["figures"]["greedy"] for row in mine if row["row"] == names[0]]
        assert f"{statistics.fmean(first):.1f}" in lines[2]
    assert len({(row["table"], row["row"], row["seed"]) for row in rows}) == len(rows)


def test_results_md_holds_what_was_measured():
    """Catches tables in RESULTS.md that were typed, or are older than results.jsonl."""
    rows = [json.loads(line) for line in (ROOT / "experiments" / "results.jsonl").read_text().splitlines()]
    text = (ROOT / "RESULTS.md").read_text()
    for name in {row["table"] for row in rows}:
        assert results.table([row for row in rows if row["table"] == name]) in text
    assert results.why_tables(results.read("why.jsonl")) in text
