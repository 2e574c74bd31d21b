"""The package is built in floors; imports go down only."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "recollect"

#: The floor of each module or subpackage of recollect.
FLOORS = {
    "units": 0,
    "components": 0,
    "errors": 0,
    "codec": 0,  # turns any frozen dataclass into JSON and back; knows none of the records that use it
    "nesting": 0,
    "records": 0,
    "profile_index": 1,
    "rerun_model": 1,
    "tape_model": 1,
    "simulate": 1,
    "solve": 1,
    "_torch_private": 2,
    "measure": 2,
    "replay": 2,
    "meter": 2,
    "out_of_memory": 2,
    "budget": 2,
    "group": 2,
    "distributed_tensors": 2,
    "sharded": 2,
    "_fsdp_private": 2,
    "step_shape": 2,
    "live_plan": 3,
    "apply": 3,
    "verify": 3,
    "verify_regions": 3,
    "report": 3,
    "shapes": 4,
    "planner": 4,
    "": 4,  # the façade, recollect/__init__.py
    "train": 5,
    "cli": 6,
    "__main__": 6,
}
TORCH_FREE_FLOORS = (0, 1)


def modules() -> dict[str, Path]:
    """Module name, relative to the package, to its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names that the code imports when it runs, inside functions too."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if is_type_checking(node):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def package_imports(known: dict[str, Path], path: Path) -> set[str]:
    """The package's modules that ``path`` imports; ``""`` is the façade."""
    found = set()
    for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
        head, _, rest = name.partition(".")
        if head == "recollect" and rest in known:
            found.add(rest)
    # `from recollect import codec` names the package on the way to a module: only a name that is not a module is taken
    # from the façade itself.
    takes_from_facade = any(
        (
            isinstance(node, ast.ImportFrom)
            and node.module == "recollect"
            and any(alias.name not in known for alias in node.names)
        )
        or (isinstance(node, ast.Import) and any(alias.name == "recollect" for alias in node.names))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    return found if takes_from_facade else found - {""}


def floor_of(module: str) -> int:
    head = module.split(".")[0]
    assert head in FLOORS, f"recollect/{head} has no floor: give it one in tests/test_floors.py"
    return FLOORS[head]


def test_imports_go_down_only() -> None:
    known = modules()
    upward = [
        f"recollect.{importer} (F{floor_of(importer)}) imports recollect.{imported} (F{floor_of(imported)})"
        for importer, path in known.items()
        for imported in package_imports(known, path)
        if floor_of(imported) > floor_of(importer)
    ]
    assert upward == []


def test_there_are_no_cycles() -> None:
    known = modules()
    graph = {importer: package_imports(known, path) - {importer} for importer, path in known.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(known)


def test_the_import_parser_sees_what_it_should() -> None:
    code = (
        "from typing import TYPE_CHECKING\n"
        "import recollect.units\n"
        "if TYPE_CHECKING:\n    from recollect.apply import Applied\n"
        "def f():\n    from recollect import verify\n"
    )
    names = imported_names(ast.parse(code))
    assert {"recollect.units", "recollect.verify"} <= names
    assert "recollect.apply" not in names


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_low_floors_import_without_torch() -> None:
    """Reading a profile, solving it and reading the plan need no PyTorch."""
    names = sorted(f"recollect.{name}" for name in modules() if name and floor_of(name) in TORCH_FREE_FLOORS)
    assert {"recollect.units", "recollect.solve", "recollect.simulate"} <= set(names)
    result = run_python(f"import sys; sys.modules['torch'] = None; import {', '.join(names)}")
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    heavy = ("transformers", "matplotlib", "scipy", "sklearn", "statsmodels", "pandas")
    code = f"import sys, recollect; print([name for name in {heavy!r} if name in sys.modules])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_private_pytorch_is_behind_one_door() -> None:
    """Underscore modules of PyTorch are imported in `_torch_private` only, those of FSDP2 in `_fsdp_private`."""
    offenders = [
        f"recollect.{module}: {name}"
        for module, path in modules().items()
        if module not in ("_torch_private", "_fsdp_private")
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "torch" and any(part.startswith("_") for part in name.split("."))
    ]
    assert offenders == []
