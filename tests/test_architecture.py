"""What import-linter's contracts (pyproject.toml) cannot say about the package's structure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit

PACKAGE = Path(tightfit.__file__).parent

#: Rooms that need no PyTorch; the contract says so of imports, this shows it.
TORCH_FREE = ("units", "peak_breakdown", "errors", "records", "simulation", "solver")

#: The doors: the only files that touch what PyTorch keeps private.
DOORS = ("_torch_private.py", "distributed/_fsdp_private.py", "operators/_checkpoint_private.py")


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
        if name not in DOORS:
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
