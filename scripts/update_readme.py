"""Put measured tables into the README and the pages of docs/, between their marks: `python scripts/update_readme.py`.

A mark is a comment that names a file, `<!-- from docs/evaluation/table.md -->`; the text up to `<!-- end -->` is
replaced by that file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- from (\S+) -->\n)(?:(?!<!-- from ).)*?(<!-- end -->)", re.DOTALL)


def pages(folder: Path) -> list[Path]:
    """The README, and one page for each question."""
    return [folder / "README.md", *sorted((folder / "docs").glob("*.md"))]


def filled(text: str, folder: Path) -> str:
    """The text with each marked place filled from its file in `folder`. Raises: OSError."""
    return MARKED.sub(lambda m: f"{m[1]}\n{(folder / m[2]).read_text(encoding='utf-8').strip()}\n\n{m[3]}", text)


def main() -> None:
    for page in pages(ROOT):
        page.write_text(filled(page.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
