"""The shape of the house: which room may import which, and that importing does nothing else."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minireuse"
WORKSHOPS = {"search", "sample", "evaluate"}
SHARED = {"checkpoints", "common"}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in FILES}


def room(path: Path) -> str:
    """The folder inside the package; "" for the front room."""
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def imported(tree: ast.AST) -> set[str]:
    """All that a syntax tree imports, with what is taken from it: `from a.b import c` is "a.b.c"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are written out in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offered(workshop: str) -> set[str]:
    """What the `__init__.py` of a room lists in `__all__`."""
    for node in TREES[PACKAGE / workshop / "__init__.py"].body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def allowed(here: Path, name: str) -> bool:
    """Whether a file may import a name of the package, such as "search.build" or "plan.Site"."""
    own, (other, *inside) = room(here), name.split(".")
    if not (PACKAGE / other).is_dir() or other == own:  # the front room is open to all
        return True
    if own == "":  # of which one file loads models
        return here.name == "pipeline.py" and other == "checkpoints" and (not inside or inside[0] in offered(other))
    if own in SHARED or own == "compilation":
        return other == "checkpoints"
    return other in SHARED or (other in WORKSHOPS and len(inside) == 1 and inside[0] in offered(other))


def test_the_front_room_needs_no_workshop_and_a_workshop_of_others_only_what_they_offer() -> None:
    assert {room(p) for p in FILES} == {"", *WORKSHOPS, *SHARED, "compilation"}
    broken = [
        (str(here.relative_to(PACKAGE)), name)
        for here, tree in TREES.items()
        for name in imported(tree) - entered_on_demand(here)
        if name.startswith("minireuse.") and not allowed(here, name.removeprefix("minireuse."))
    ]
    assert broken == []


def test_the_diagram_of_the_rooms_has_the_imports_that_there_are() -> None:
    text = (PACKAGE.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rooms = {*WORKSHOPS, *SHARED, "compilation", "joined"}
    arrows = re.findall(r"^ *(\w+)(?:\[.*?\])? -\.?->(?:\|.*?\|)? (\w+)", text.split("How the rooms")[1], re.MULTILINE)
    drawn = {(a, b) for a, b in arrows if {a, b} <= rooms}
    found = set()
    for here, tree in TREES.items():
        others = [name.split(".")[1] for name in imported(tree) if name.startswith("minireuse.")]
        found |= {(room(here) or "joined", other) for other in others if (PACKAGE / other).is_dir()}
    assert drawn == {(a, b) for a, b in found if a != b}


def entered_on_demand(here: Path) -> set[str]:
    """What the command line imports inside the function that handles `--compile`: nobody else pays for that room."""
    if here != PACKAGE / "sample" / "command.py":
        return set()
    functions = (node for node in ast.walk(TREES[here]) if isinstance(node, ast.FunctionDef))
    return {name for f in functions for name in imported(f) if name.startswith("minireuse.compilation.")}


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ("plan.py", "cache.ReuseCache", True),
        ("pipeline.py", "checkpoints", True),
        ("pipeline.py", "checkpoints.load_parts", True),
        ("pipeline.py", "checkpoints.ldm", False),
        ("guidance.py", "checkpoints", False),
        ("guidance.py", "compilation.CompiledUNet", False),
        ("policies.py", "search.plans_of", False),
        ("sample/command.py", "search.build", True),
        ("sample/command.py", "search.phast", False),  # a file of that room, which it does not offer
        ("sample/command.py", "search.phast.search", False),
        ("sample/command.py", "compilation.CompiledUNet", False),
        ("search/command.py", "search.phast.search", True),
        ("common/ranks.py", "checkpoints.reason", True),
        ("common/ranks.py", "search.search", False),
        ("checkpoints/ldm.py", "common.journal.Journal", False),
    ],
)
def test_the_rule_itself(file: str, name: str, expected: bool) -> None:
    assert allowed(PACKAGE / file, name) == expected


@pytest.mark.parametrize("name", [*sorted(WORKSHOPS), "checkpoints"])
def test_a_room_has_what_it_offers(name: str) -> None:
    module = importlib.import_module(f"minireuse.{name}")
    assert {wanted for wanted in offered(name) if not hasattr(module, wanted)} == set()


def test_plans_know_no_model() -> None:
    """`plan.py` and `policies.py` reach no torch, by themselves or through what they import."""
    reached, todo = set[Path](), [PACKAGE / "plan.py", PACKAGE / "policies.py"]
    while todo:
        here = todo.pop()
        reached.add(here)
        names = imported(TREES[here])
        assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "einops"}, here
        inside = {PACKAGE / f"{name.split('.')[1]}.py" for name in names if name.startswith("minireuse.")}
        todo += [p for p in inside if p not in reached]
    assert PACKAGE / "cache.py" not in reached


@pytest.mark.parametrize(
    "imports",
    [
        "import minireuse; from minireuse import cache, plan, policies, samplers, schedule",
        "from minireuse.search import build, plans_of, search",
    ],
)
def test_samplers_plans_and_search_cost_torch_alone(imports: str) -> None:
    code = (
        f"import sys; {imports}\n"
        "heavy = ('transformers', 'diffusers', 'safetensors', 'einops', 'PIL', 'minireuse.unet')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_anything_does_nothing(tmp_path: Path) -> None:
    """No file of the repository is read but code, no connection is opened, no device is set up, nothing is printed."""
    modules = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in FILES]
    code = (
        "import importlib, sys, torch\n"
        "root, *modules = sys.argv[1:]\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): raise RuntimeError(f'{event} {args}')\n"
        "    if event == 'open' and str(args[0]).startswith(root) and not str(args[0]).endswith(('.py', '.pyc')):\n"
        "        if '__pycache__' not in str(args[0]): raise RuntimeError(f'opened {args[0]}')\n"
        "sys.addaudithook(hook)\n"
        "for name in modules: importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
    )
    command = [sys.executable, "-c", code, str(PACKAGE.parent), *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


def test_schedule_and_samplers_import_torch_the_standard_library_and_each_other() -> None:
    own = {"schedule.py": set[str](), "samplers.py": {"minireuse.schedule"}}
    for file, others in own.items():
        names = {n for n in imported(TREES[PACKAGE / file]) if n.split(".")[0] not in sys.stdlib_module_names}
        assert {n if n == "torch" else n.rpartition(".")[0] for n in names} <= {"torch", *others}


def test_schedule_and_samplers_work_in_an_empty_folder(tmp_path: Path) -> None:
    for name in ("schedule.py", "samplers.py"):
        text = (PACKAGE / name).read_text(encoding="utf-8")
        text = re.sub(r"^from minireuse\.schedule import", "from schedule import", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text, encoding="utf-8")
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.modules['minireuse'] = None  # from here on, importing it is an error\n"
        "import torch\n"
        "from samplers import ddim\n"
        "from schedule import SD_SCHEDULE, Schedule\n"
        "schedule = Schedule.from_config(SD_SCHEDULE)\n"
        "times = schedule.timesteps(20)\n"
        # Data that is 0 or noise alone: eps = x / sigma, so that every x_0 is 0.
        "steps = list(ddim(lambda x, t, call: x / schedule.sigma(t), torch.ones(3), schedule, times))\n"
        "print(len(steps), float(steps[-1].x_0.abs().max()) < 1e-6)\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "20 True"


def test_package_never_imports_diffusers() -> None:
    assert [p for p, tree in TREES.items() if any(n.split(".")[0] == "diffusers" for n in imported(tree))] == []


def test_no_function_fills_in_the_arguments_of_a_command_line() -> None:
    """What is computed on the way is passed on by its name, so that `args` is what was typed."""
    for path in (p for p in FILES if room(p) in ("search", "evaluate", "common")):
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "args"), f"{path}:{node.lineno}"
