"""The package is built in floors; imports go down only."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tightfit"

#: The floor of each module or subpackage of tightfit.
FLOORS = {
    "units": 0,
    "peak_breakdown": 0,
    "errors": 0,
    "records": 0,
    "simulation": 1,
    "solver": 1,
    "_torch_private": 2,
    "profiling": 2,
    "replay": 2,
    "operators": 2,
    "device": 2,
    "distributed": 2,
    "step": 2,
    "installation": 3,
    "verification": 3,
    "report": 3,
    "planning": 4,
    "": 4,  # the façade, tightfit/__init__.py
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
        if head == "tightfit" and rest in known:
            found.add(rest)
    # `from tightfit import codec` names the package on the way to a module: only a name that is not a module is taken
    # from the façade itself.
    takes_from_facade = any(
        (
            isinstance(node, ast.ImportFrom)
            and node.module == "tightfit"
            and any(alias.name not in known for alias in node.names)
        )
        or (isinstance(node, ast.Import) and any(alias.name == "tightfit" for alias in node.names))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    return found if takes_from_facade else found - {""}


def floor_of(module: str) -> int:
    head = module.split(".")[0]
    assert head in FLOORS, f"tightfit/{head} has no floor: give it one in tests/test_floors.py"
    return FLOORS[head]


def test_imports_go_down_only() -> None:
    known = modules()
    upward = [
        f"tightfit.{importer} (F{floor_of(importer)}) imports tightfit.{imported} (F{floor_of(imported)})"
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
        "import tightfit.units\n"
        "if TYPE_CHECKING:\n    from tightfit.apply import Applied\n"
        "def f():\n    from tightfit import verify\n"
    )
    names = imported_names(ast.parse(code))
    assert {"tightfit.units", "tightfit.verify"} <= names
    assert "tightfit.apply" not in names


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_low_floors_import_without_torch() -> None:
    """Reading a profile, solving it and reading the plan need no PyTorch."""
    names = sorted(f"tightfit.{name}" for name in modules() if name and floor_of(name) in TORCH_FREE_FLOORS)
    assert {"tightfit.units", "tightfit.solver", "tightfit.simulation.simulator"} <= set(names)
    result = run_python(f"import sys; sys.modules['torch'] = None; import {', '.join(names)}")
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    heavy = ("transformers", "matplotlib", "scipy", "sklearn", "statsmodels", "pandas")
    code = f"import sys, tightfit; print([name for name in {heavy!r} if name in sys.modules])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_private_pytorch_is_behind_one_door() -> None:
    """Underscore modules of PyTorch are imported in `_torch_private` only, those of FSDP2 in `_fsdp_private`."""
    offenders = [
        f"tightfit.{module}: {name}"
        for module, path in modules().items()
        if module not in ("_torch_private", "distributed._fsdp_private")
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "torch" and any(part.startswith("_") for part in name.split("."))
    ]
    assert offenders == []
