"""The notebook that teaches the method: `python scripts/tour.py` makes docs/tour.ipynb of docs/tour.py, and runs it.

docs/tour.py holds the cells as plain Python, with `# %%` before each; edit that file.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "tour.py"
CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n(.*?)(?=^# %%|\Z)", re.DOTALL | re.MULTILINE)


def cells(text: str) -> nbformat.NotebookNode:
    """A notebook that has not been run."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, (kind, body) in enumerate(CELL.findall(text)):
        if kind:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        new = nbformat.v4.new_markdown_cell if kind else nbformat.v4.new_code_cell
        notebook.cells.append(new(body.strip(), id=f"cell-{number:02d}"))
    return notebook


def run(notebook: nbformat.NotebookNode) -> None:
    """Run all cells, in a process of their own; the outputs are put in. Raises: what a cell raises."""
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None)  # of a picture it names only the type and the size
    notebook.metadata.pop("language_info", None)  # the version of Python changes nothing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "tour.ipynb")
    args = parser.parse_args(argv)
    notebook = cells(SOURCE.read_text(encoding="utf-8"))
    run(notebook)
    args.out.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
