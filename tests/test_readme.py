"""What the README shows is what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import update_readme


def test_marked_places_take_the_text_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("| new \\1 |\n")
    text = "before\n<!-- from docs/a.md -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    expected = "before\n<!-- from docs/a.md -->\n\n| new \\1 |\n\n<!-- end -->\nafter <!-- end -->\n"
    assert update_readme.filled(text, tmp_path) == expected
    assert update_readme.filled(expected, tmp_path) == expected


def test_the_python_examples_run() -> None:
    text = (update_readme.ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert len(examples) == 3
    assert names["result"].images.shape == (1, 128, 128, 3)


def test_the_readme_holds_the_tables_of_docs() -> None:
    text = (update_readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert update_readme.MARKED.search(text)
    assert update_readme.filled(text, update_readme.ROOT) == text
