"""The shape of the house: which room may import which, and that importing does nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "minireuse"
WORKSHOPS = {"search", "sample", "evaluate"}
SHARED = {"checkpoints", "common"}


def room(path: Path) -> str:
    """The folder inside the package; "" for the front room."""
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def imported(tree: ast.AST) -> set[tuple[str, ...]]:
    """The modules of minireuse that a syntax tree imports, as paths inside the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minireuse":
            inside = tuple(str(node.module).split(".")[1:])
            found |= {inside} if inside else {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("minireuse.")}
    return found


def allowed(here: Path, module: tuple[str, ...]) -> bool:
    own, other = room(here), module[0] if (PACKAGE / module[0]).is_dir() else ""
    if other in ("", own):
        return True
    if own == "":  # the front room, of which one file loads models
        return here.name == "pipeline.py" and module == ("checkpoints",)
    if own in SHARED or own == "compilation":
        return other in SHARED and other != "common"
    return other in SHARED or (other in WORKSHOPS and len(module) == 1)  # of another workshop, what it offers


def test_the_front_room_needs_no_workshop_and_a_workshop_of_others_only_what_they_offer() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(p) for p in files} == {"", *WORKSHOPS, *SHARED, "compilation"}
    trees = {p: ast.parse(p.read_text()) for p in files}
    # Whoever asks for compiled graphs enters that room by an import inside a function, not as a file loads.
    asked = {
        (p, module)
        for p, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for module in imported(node)
        if module == ("compilation",)
    }
    assert {room(p) for p, _ in asked} == {"sample"}
    broken = [
        (str(p.relative_to(PACKAGE)), ".".join(module))
        for p, tree in trees.items()
        for module in imported(tree)
        if not allowed(p, module) and (p, module) not in asked
    ]
    assert broken == []


def test_plans_know_no_model() -> None:
    for name in ("plan.py", "policies.py"):
        assert "torch" not in {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }


def test_samplers_and_plans_cost_torch_alone() -> None:
    code = (
        "import sys, minireuse\n"
        "from minireuse import cache, policies, samplers, schedule\n"
        "heavy = ('transformers', 'diffusers', 'safetensors', 'einops', 'PIL', 'minireuse.unet')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_schedule_and_samplers_work_in_an_empty_folder(tmp_path: Path) -> None:
    for name in ("schedule.py", "samplers.py"):
        text = (PACKAGE / name).read_text()
        text = re.sub(r"^from minireuse\.schedule import", "from schedule import", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from samplers import ddim\n"
        "from schedule import SD_SCHEDULE, Schedule\n"
        "schedule = Schedule.from_config(SD_SCHEDULE)\n"
        "times = schedule.timesteps(20)\n"
        # Data that is 0 or noise alone: eps = x / sigma, so that every x_0 is 0.
        "steps = list(ddim(lambda x, t, call: x / schedule.sigma(t), torch.ones(3), schedule, times))\n"
        "print(len(steps), float(steps[-1].x_0.abs().max()) < 1e-6)\n"
        "print([m for m in sys.modules if m.startswith(('minireuse', 'numpy.', 'einops'))][:1])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "20 True"
    assert "minireuse" not in done.stdout


def test_package_never_imports_diffusers() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "diffusers" for n in names), path
