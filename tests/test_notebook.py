"""docs/tour.ipynb, executed with a few questions and steps."""

import shutil

import pytest
from conftest import ROOT


def test_the_tour_runs(tmp_path, monkeypatch):
    """Catches a cell that fails, and a figure, page or answer that is not shown."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    for name in ("support", "tasks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("SVPO_TINY", "1")
    notebook = nbformat.read(tmp_path / "docs" / "tour.ipynb", as_version=4)
    at = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=200, resources=at).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(one.get("text", "") for one in part) for part in outputs]
    assert "round1" in texts[1] and "runs/tour: 4 unseen questions" in texts[1]
    assert "<iframe srcdoc=" in outputs[2][-1].data["text/html"]
    assert texts[3].startswith("3+4*5-2\n") and texts[3].rstrip().endswith(("right", "wrong"))
    assert "majority:32" in texts[4] and "image/png" in outputs[4][-1].data
