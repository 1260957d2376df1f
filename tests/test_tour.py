"""The notebook is made of its source, and all its cells run."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra docs")
pytest.importorskip("ipykernel", reason="notebooks need the extra docs")
tour = pytest.importorskip("tour", reason="notebooks need the extra docs")  # imports nbclient

NOTEBOOK = tour.ROOT / "docs" / "tour.ipynb"


def test_cells_are_told_apart() -> None:
    text = "# a note\n\n# %% [markdown]\n# # Head\n#\n# A word.\n\n# %%\nx = 1\n# a comment\n\n# %%\nprint(x)\n"
    found = [(cell.cell_type, cell.source) for cell in tour.cells(text).cells]
    assert found == [("markdown", "# Head\n\nA word."), ("code", "x = 1\n# a comment"), ("code", "print(x)")]


def test_the_notebook_is_that_of_the_source_and_has_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    expected = tour.cells(tour.SOURCE.read_text(encoding="utf-8"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in expected.cells]
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 3e6


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    tour.main(["--out", str(tmp_path / "tour.ipynb")])  # it stops at the first cell that fails
    ran = nbformat.read(tmp_path / "tour.ipynb", as_version=4)
    pictures = [
        output for cell in ran.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 10
