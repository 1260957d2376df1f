"""What a reader of the README and of docs/ relies on: commands, examples, links and numbers are right."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import update_readme

import minireuse
from minireuse.evaluate.command import parser as evaluate_parser
from minireuse.policies import POLICIES
from minireuse.sample.options import sample_parser
from minireuse.search import build, policies_for
from minireuse.search.command import parser as search_parser

ROOT = update_readme.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = update_readme.pages(ROOT)
PARSERS = {"minireuse.sample": sample_parser, "minireuse.search": search_parser, "minireuse.evaluate": evaluate_parser}
WORDS = 1800  # as `wc -w` counts them

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page as lists of words: of its shell blocks, and python's between single backticks."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    for line in [*lines, *(" ".join(span.split()) for span in spans if span.startswith("python "))]:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def parsed(words: list[str]) -> Any:
    """A command of the package as its own parser reads it, or None for another command."""
    if "-m" not in words[:-1] or words[words.index("-m") + 1] not in PARSERS:
        return None
    at = words.index("-m") + 1
    parser: ArgumentParser = PARSERS[words[at]]()
    if not words[at + 1 :]:
        return None  # the command is only named
    known = [name for action in parser._actions for name in action.option_strings]
    assert {word for word in words[at + 1 :] if word.startswith("--")} <= set(known), words
    required = [] if "--out" in words or words[at] == "minireuse.sample" else ["--out", "results"]
    return parser.parse_args(words[at + 1 :] + required)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= WORDS


@pages
def test_commands_exist_and_parse(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[:2] == ["python", "-m"] or words[0] == "torchrun":
            assert words[words.index("-m") + 1] in PARSERS, words
            parsed(words)
        elif words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--")), words
        elif words[0] == "pip":
            assert (ROOT / "constraints.txt").is_file()
            extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            for names in re.findall(r"\[(.*)\]", " ".join(words)):
                assert all(f"\n{name} = [" in extras for name in names.split(",")), words
        else:
            assert words[0] in ("ruff", "mypy", "pytest"), words


@pages
def test_policies_in_commands_can_be_built(page: Path) -> None:
    sites = minireuse.load(device="meta").sites
    for words in commands(page.read_text(encoding="utf-8")):
        args = parsed(words)
        names = [getattr(args, "policy", None), *(getattr(args, "policies", None) or [])]
        for name in (n for n in names if n and not n.startswith("steps:") and not n.endswith(".json")):
            chosen = {"k": args.reuse, "which": getattr(args, "sites", None), "kind": getattr(args, "kind", None)}
            chosen |= {"latency": getattr(args, "latency", None)}
            policies = policies_for(name, None, "ddim", lambda: "")
            plan = build(name, 20, sites, policies=policies, **{key: value for key, value in chosen.items() if value})
            assert plan.reused > 0 or name == "none", name


def test_the_policies_are_drawn_as_they_are() -> None:
    sites = minireuse.load(device="meta").sites
    text = (ROOT / "docs" / "choosing-a-policy.md").read_text(encoding="utf-8")
    drawn = dict(re.findall(r"^\| `(\w+)` \| `([.#]+)` \|", text, re.MULTILINE))
    assert drawn.keys() >= {"none", "hurry", "early", "interval", "deepcache"}
    assert {name: build(name, 20, sites).grid for name in drawn} == drawn
    assert {*re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)} >= POLICIES.keys()


@pages
def test_python_examples_run(page: Path) -> None:
    examples = blocks(page.read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    if page.name == "README.md":
        assert len(examples) == 2
        assert names["result"].images.shape[0] == 2
        assert names["result"].calls == names["plan"].calls == 20
        assert names["step"].x.std().item() == pytest.approx(0.5, rel=0.05)


@pages
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


def test_the_readme_names_every_page_and_every_room() -> None:
    titles = dict(re.findall(r"\[([^\]]+)\]\(docs/([\w-]+\.md)\)", README.split("## Where things are")[1]))
    assert set(titles.values()) == {page.name for page in PAGES[1:]} - {
        "faults.md",
        "verify.md",
    }  # which are tables alone
    for title, name in titles.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8").startswith(f"# {title}\n")
    rows = [line.split("|")[1] for line in README.splitlines() if re.match(r"\| `[\w./]+(/|\.py)`", line)]
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    package = {path.name for path in (ROOT / "minireuse").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == package - {"__init__.py", "__pycache__", "weights"}


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name, value in re.findall(r"^ *(prompt)=(\".*\")$", script, re.MULTILINE):
        script = script.replace(f'"${name}"', value)
    short = {"--constraint": "-c", "--editable": "-e"}
    ran = [
        [short.get(word, word) for word in shlex.split(part) if word not in ("--quiet", "-P")]
        for line in script.splitlines()
        if "$" not in line and not line.lstrip().startswith("#")
        for part in line.split("&&")
    ]
    install, test = (list(commands(f"```sh\n{block}```")) for block in blocks(README, "sh")[:2])
    assert install[0] == ["pip", "install", "-c", "constraints.txt", "."]
    assert install[1] in ran
    assert all(command in ran for command in test), test


def test_the_readmes_numbers_are_those_of_the_evaluation() -> None:
    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("| ").split(" | ")]

    text = (ROOT / "docs" / "evaluation" / "table.md").read_text(encoding="utf-8")
    head, _, *lines = (line for line in text.splitlines() if line.startswith("|"))  # notes follow
    columns = cells("|  " + head.lstrip("|").strip())[-8:]  # the first has no name
    measured = {cells(line)[0]: dict(zip(columns, cells(line)[1:], strict=True)) for line in lines}
    rows = [cells(line) for line in README.splitlines() if re.search(r"\| `.*\| [\d.]+ \| [\d.]+ \|", line)]
    assert len(rows) == 7
    for _, policy, *numbers in rows:
        names = ("PSNR, dB [95 %]", "time", "time, explicit maps", "cache, MiB")
        assert numbers == [measured[policy][name].split(" [")[0] for name in names], policy
    taken = [float(measured[name]["time"].split()[0]) for name in ("`interval:kind=out`", "`phast`")]
    outputs, searched = (100 - 100 * share for share in taken)
    text = " ".join(README.split())
    assert f"outputs in every other call save {outputs:.0f} %" in text
    assert f"others are skipped, saves {searched:.0f} %" in text


def test_marked_places_take_the_text_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("| new \\1 |\n")
    text = "before\n<!-- from docs/a.md -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    expected = "before\n<!-- from docs/a.md -->\n\n| new \\1 |\n\n<!-- end -->\nafter <!-- end -->\n"
    assert update_readme.filled(text, tmp_path) == expected
    assert update_readme.filled(expected, tmp_path) == expected


def test_pages_hold_the_tables_of_docs() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sum(len(update_readme.MARKED.findall(text)) for text in texts) == 6
    assert all(update_readme.filled(text, ROOT) == text for text in texts)
