"""What import-linter's contracts (pyproject.toml) cannot say about the package's structure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit

PACKAGE = Path(tightfit.__file__).parent

#: Rooms that need no PyTorch; the contract says so of imports, this shows it.
TORCH_FREE = ("units", "collector", "peak_breakdown", "errors", "records", "simulation", "solver")

#: The doors: the only files and folders that touch what PyTorch keeps private.
DOORS = (
    "_torch_private/",
    "distributed/_ddp_private.py",
    "distributed/_fsdp_private.py",
    "operators/_checkpoint_private.py",
)


#: Other libraries, whose underscore names are not PyTorch's, and the documented ones of named tuples.
OTHERS = ("argparse", "functools", "highspy", "os", "sys")
NAMED_TUPLE = ("_fields", "_make")


def modules_of(*rooms: str) -> list[str]:
    paths = [path for room in rooms for path in (PACKAGE / f"{room}.py", *(PACKAGE / room).rglob("*.py"))]
    return sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if path.exists()
    )


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_torch_free_rooms_import_without_torch() -> None:
    names = modules_of(*TORCH_FREE)
    assert {"tightfit.units", "tightfit.solver.solver", "tightfit.simulation.simulator"} <= set(names)
    result = run_python(f"import sys; sys.modules['torch'] = None; import {', '.join(names)}")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_module_can_be_imported_by_its_name() -> None:
    """No public function has the name of a folder or module beside it, which would hide that."""
    names = [name for name in modules_of(*(path.stem for path in PACKAGE.iterdir())) if "__main__" not in name]
    code = (
        "import importlib, types\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "import tightfit\n"
        f"for name in {names!r}:\n"
        "    found = tightfit\n"
        "    for part in name.split('.')[1:]:\n"
        "        found = getattr(found, part)\n"
        "    assert isinstance(found, types.ModuleType), name\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    heavy = ("transformers", "matplotlib", "scipy", "sklearn", "statsmodels", "pandas", "accelerate", "lightning")
    code = f"import sys, tightfit; print([name for name in {heavy!r} if name in sys.modules])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def private_imports(tree: ast.AST) -> list[str]:
    """Underscore modules and names of PyTorch that the code imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name for name in names if name.startswith("torch.") and ".__" not in name and "._" in name]
    return found


def private_names_as_text(tree: ast.AST) -> list[str]:
    """Underscore attributes that are asked for by `getattr` and its kin."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        and isinstance(name := node.args[1], ast.Constant)
        and str(name.value).startswith("_")
        and not str(name.value).startswith("__")
        and name.value not in NAMED_TUPLE
    ]


def private_attributes(tree: ast.AST) -> list[str]:
    """Underscore attributes read from anything but the object itself, its class, or a module of the package.

    Those that the file defines (``self._x = ...``, methods, fields, slots) are its own.
    """
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in own
        and node.attr not in NAMED_TUPLE
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and ast.unparse(node).partition(".")[0] not in OTHERS
    ]


def test_private_pytorch_is_behind_the_doors() -> None:
    offenders = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(DOORS):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            offenders += [
                f"{name}: {found}"
                for found in (*private_imports(tree), *private_attributes(tree), *private_names_as_text(tree))
            ]
    assert offenders == []


def test_private_attributes_are_seen() -> None:
    code = (
        "class A:\n    def f(self, t):\n        self._own = t\n        return t._own, self._x, t._version, t.__dict__\n"
    )
    assert private_attributes(ast.parse(code)) == ["line 4: t._version"]
    assert private_names_as_text(ast.parse("getattr(t, '_base', None)")) == ["line 1: getattr(t, '_base', None)"]
    assert private_imports(ast.parse("from torch._C import _x\nimport torch.fx\n")) == ["torch._C._x"]


#: A comment that silences a check, and nothing after it.
WITHOUT_REASON = re.compile(r"# (noqa|type: ignore|pragma: no cover)(: [A-Z0-9, ]+|\[[a-z, -]+\])?$")


def test_a_check_is_silenced_with_a_reason() -> None:
    """As a second comment behind it."""
    root = PACKAGE.parent
    unreasoned = [
        f"{path.relative_to(root).as_posix()}:{number}: {line.strip()}"
        for folder in ("tightfit", "tests", "benchmarks", "docs", "examples")
        for path in sorted((root / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if WITHOUT_REASON.search(line)
    ]
    assert unreasoned == []


@pytest.mark.parametrize("silenced", ["noqa", "noqa: E731", "type: ignore", "type: ignore[misc, no-any-return]"])
def test_a_silenced_check_without_a_reason_is_seen(silenced: str) -> None:
    assert WITHOUT_REASON.search(f"x = 1  # {silenced}")
    assert not WITHOUT_REASON.search(f"x = 1  # {silenced}  # it is the point")
