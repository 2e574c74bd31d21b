"""A test that reaches for a package of an extra which is not installed is skipped, wherever it does."""

from __future__ import annotations

import builtins
import importlib.util
from typing import Any

import pytest

#: What the package's extras bring; see pyproject.toml.
PACKAGES = (
    "accelerate", "datasets", "lightning", "matplotlib", "PIL", "peft", "pmdarima", "shtab", "sklearn",
    "statsmodels", "tensorboard", "timm", "tokenizers", "transformers", "xgboost",
)  # fmt: skip
#: Imports of another package that need one of them.
_BY_WAY_OF = {"torch.utils.tensorboard": "tensorboard"}
#: Whose imports count. Other libraries try some of these, and go on without.
_OURS = ("benchmarks", "examples", "tests", "tightfit")


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules[package] is None: its import is blocked
        return False


def skip_what_needs_missing_ones() -> None:
    """Have our own imports of missing packages end the test, or the import of its module, as skipped."""
    missing = {package for package in PACKAGES if not is_installed(package)}
    if not missing:
        return
    right = builtins.__import__

    def importing(name: str, importer: Any = None, *rest: Any, **named: Any) -> Any:
        importer = named.pop("globals", importer)
        package = _BY_WAY_OF.get(name, name).partition(".")[0]
        if package in missing and (importer or {}).get("__name__", "").partition(".")[0] in _OURS:
            raise pytest.skip.Exception(f"needs {package}", allow_module_level=True)
        return right(name, importer, *rest, **named)

    builtins.__import__ = importing
