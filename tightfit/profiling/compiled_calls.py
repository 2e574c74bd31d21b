"""Keep whole what calls functions that `torch.compile` made, such as compiled attention.

A compiled function runs kernels that the dispatcher does not see, and under a dispatch mode PyTorch would not compile
it: a region that is recorded would compute something else than the plain step.  So measuring runs it eagerly, which
shows its operations, and the module that calls it becomes a region without a decision: a planned step runs that as the
plain step does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch

from tightfit._torch_private import in_compiled_call
from tightfit.operators.region_names import LOSS, ROOT
from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.records import EventKind
from tightfit.step.exclude import is_inside

REASON = "it calls a function that torch.compile made"
#: As in `Profile.switched_off`.
COMPILED_FUNCTIONS = "functions that torch.compile made"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run inside, eagerly, what `torch.compile` made: its code launches kernels that no dispatch mode sees."""
    with torch.compiler.set_stance("force_eager"):
        yield


class CompiledCalls:
    """Notes where in a forward compiled functions are called."""

    def __init__(self) -> None:
        self.callers: set[str] = set()
        """Paths of the modules that call one; `<loss>` for code outside the model."""
        self.inside: set[str] = set()
        """Paths of the modules that one calls."""
        self._open: list[tuple[str, bool]] = []  # module calls: the path, and whether a compiled function made it

    @property
    def open_paths(self) -> list[str]:
        """Paths of the module calls that are open, the outermost first."""
        return [path for path, _ in self._open]

    def enter_module(self, path: str) -> None:
        """Note the start of a module call."""
        self._open.append((path, in_compiled_call()))
        if self._open[-1][1]:
            self.inside.add(path)
            self._note_caller()

    def exit_module(self) -> None:
        """Note the end of the innermost module call."""
        self._open.pop()

    def note_op(self) -> None:
        """Note who calls the compiled function that an operation runs in, if it runs in one."""
        if in_compiled_call():
            self._note_caller()

    def _note_caller(self) -> None:
        self.callers.add(next((path for path, inside in reversed(self._open) if not inside), LOSS))


def regions_around_compiled(
    paths: Sequence[str], callers: AbstractSet[str], inside: AbstractSet[str], excluded: Sequence[str]
) -> tuple[str, ...]:
    """Return the paths of the regions: each caller is one of its own, and nothing that a compiled function calls is."""
    own = {path for path in callers - {LOSS, ROOT} if not is_inside(path, excluded)}
    if ROOT in inside:
        return (ROOT,)
    rest = {path for path in {*paths[1:], *own} if not is_inside(path, inside)}
    return (ROOT, *sorted(rest))


def keep_callers(observation: Observation, region_paths: Sequence[str], callers: AbstractSet[str]) -> None:
    """Have kept what the callers' own operations make."""
    paths = frozenset(region_paths)
    regions = [LOSS]
    is_region: list[bool] = []  # of the module calls that are open
    for event in observation.events:
        if isinstance(event, ModuleEvent):
            if event.path is not None:
                is_region.append(event.path in paths)
                if is_region[-1]:
                    regions.append(event.path)
            elif is_region.pop():
                regions.pop()
        elif event.kind == EventKind.BACKWARD:
            return
        elif event.kind == EventKind.OP and regions[-1] in callers:
            op = observation.ops[event.a]
            op.keep_reason = op.keep_reason or REASON
