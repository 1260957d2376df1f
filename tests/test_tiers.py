"""The order of the package: a file imports only from lower tiers, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "minireuse"
TIERS = (
    ("files", "command", "kept", "devices"),
    ("reader", "journal", "tensors", "plan", "ranks"),
    ("config", "reuse"),
    ("schedule",),
    ("layers", "samplers", "searched", "phast"),
    ("attention", "policies"),
    ("unet", "vae", "text", "ldm", "budget"),
    ("compiled", "checkpoint", "metrics"),
    ("guidance",),
    ("pipeline",),
    ("render", "costs", "maps", "distribution", "forecast", "options"),
    ("report", "memory", "recipe"),
    ("cache_options",),
    ("sample", "search", "evaluate"),
)
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}


def imported(path: Path) -> set[str]:
    """The minireuse modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "minireuse":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minireuse."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("minireuse.")}
    return found


def test_files_import_only_from_lower_tiers() -> None:
    files = {p.stem: p for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    assert set(files) <= set(TIER)
    upward = [(a, b) for a, path in files.items() for b in imported(path) if TIER[b] >= TIER[a]]
    assert upward == []


def test_no_file_is_long() -> None:
    assert {p.name: n for p in PACKAGE.glob("*.py") if (n := len(p.read_text().splitlines())) > 350} == {}


def test_samplers_plans_and_search_cost_torch_alone() -> None:
    code = (
        "import sys, minireuse\n"
        "from minireuse import phast, policies, reuse, samplers, schedule\n"
        "heavy = ('transformers', 'diffusers', 'safetensors', 'einops', 'PIL', 'minireuse.unet')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_never_imports_diffusers() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "diffusers" for n in names), path
