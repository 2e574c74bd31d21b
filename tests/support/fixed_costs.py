"""Operations cost what a formula says, in every process of the tests.

What an operation takes differs from machine to machine and from run to run, and plans follow from it.  So that no test
depends on that, a time is made of the operation's name and bytes, and the mechanism has one price.  Memory is measured
as ever.  A test of measuring itself asks for the fixture `measured_costs`.

`install` patches the modules when they are imported, so that it can be called before, and where there is no torch.
`tests/conftest.py` does, and `startup/sitecustomize.py` does in the processes that tests start.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

#: On the path of processes that tests start; see `startup/sitecustomize.py`.
STARTUP = Path(__file__).parent / "startup"

_CALL_MS = 0.002
_BYTES_PER_MS = 5e6
#: Operations that compute more than they move.
_HEAVY = ("mm", "conv", "attention", "rnn", "lstm", "gru")
#: Milliseconds for each operation of forward and backward, in a region, taped, replayed; for each region; for each
#: operation of a module run again, and for each call of such a module.
_MECHANISM_MS = (0.0, 0.0, 0.001, 0.0005, 0.0005, 0.0, 0.0005, 0.001)


def times_ms(call: Any, *_: Any, **__: Any) -> Any:
    """What the call costs the host; no two operations cost the same for the same bytes, so that plans have no ties."""
    from tightfit.device.device import OperationTimes
    from tightfit.profiling.partial_call import argument_bytes

    name = str(call.func)
    weight = 8.0 if any(part in name for part in _HEAVY) else 1.0
    weight *= 1 + zlib.crc32(name.encode()) % 997 / 10_000
    return OperationTimes(_CALL_MS + weight * argument_bytes(call) / _BYTES_PER_MS)


def _mechanism(*_: Any, **__: Any) -> Any:
    from tightfit.profiling.mechanism_cost import Overhead

    return Overhead(*_MECHANISM_MS)


#: What measures a time that decides, by module.
_REPLACED: dict[str, dict[str, Any]] = {
    "tightfit.profiling.costs": {"_times_ms": times_ms, "_cold_code_ms": lambda: 0.0},
    "tightfit.profiling.costs_in_place": {"_opaque_times_ms": times_ms, "_once_times_ms": times_ms},
    "tightfit.profiling.mechanism_cost": {"_remembered": _mechanism},
    # Not a time, but it takes some: the curve in the report at the end of each run.
    "tightfit.report.run_charts": {"_MOST_BUDGETS": 4},
}
_measured: dict[str, dict[str, Any]] = {}


def install() -> None:
    """Fix the costs, now or when the modules are imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _REPLACED:
        if name in sys.modules:
            _patch(sys.modules[name])


@contextmanager
def measured() -> Iterator[None]:
    """Inside, costs are measured as users' are."""
    import tightfit.profiling.measure  # noqa: F401  # imports all of them

    for name, functions in _measured.items():
        for function, original in functions.items():
            setattr(sys.modules[name], function, original)
    try:
        yield
    finally:
        install()


def _patch(module: ModuleType) -> None:
    for name, replacement in _REPLACED[module.__name__].items():
        _measured.setdefault(module.__name__, {}).setdefault(name, getattr(module, name))
        setattr(module, name, replacement)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REPLACED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _patch(module)
