"""An independent snapshot of all that a test's measuring may not change, and its own fake tensors."""

from __future__ import annotations

import gc
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tightfit._torch_private.dispatch import FakeTensor, FakeTensorMode
from tightfit.step.snapshot import RandomState

Tensor = torch.Tensor


def frozen(thing: Any, seen: set[int] | None = None) -> Any:
    """Everything reachable from `thing`, as nested tuples that compare by value and by identity."""
    seen = set() if seen is None else seen
    if thing is None or isinstance(thing, int | float | str | bytes | type | torch.dtype | torch.device):
        return thing
    if id(thing) in seen:
        return ("seen", id(thing))
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return frozen_tensor(thing, seen)
    if isinstance(thing, dict):
        return (id(thing), [(frozen(k, seen), frozen(v, seen)) for k, v in thing.items()])
    if isinstance(thing, list | tuple | deque):
        return (id(thing), [frozen(part, seen) for part in thing])
    if isinstance(thing, set):
        return (id(thing), sorted(map(repr, thing)))
    if isinstance(thing, np.ndarray):
        return (id(thing), thing.tobytes())
    if isinstance(thing, torch.Generator):
        return (id(thing), thing.get_state().tolist())
    if isinstance(thing, random.Random):
        return (id(thing), thing.getstate())
    if isinstance(thing, types.FunctionType):
        return (id(thing), [id(cell.cell_contents) for cell in thing.__closure__ or ()])
    if hasattr(thing, "__dict__"):
        return (id(thing), frozen(vars(thing), seen))
    return id(thing)


def frozen_tensor(tensor: Tensor, seen: set[int]) -> Any:
    data = tensor.detach()
    return (
        id(tensor), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version,
        data.contiguous().view(torch.uint8).numpy().tobytes() if data.ndim else data.item(),
        tensor.requires_grad, frozen(tensor.grad, seen) if tensor.is_leaf else None,
        frozen(vars(tensor), seen), frozen(tensor._backward_hooks, seen),
        frozen(tensor._post_accumulate_grad_hooks, seen),
    )  # fmt: skip


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two snapshots differ."""
    if type(before) is type(after) and isinstance(before, list | tuple) and len(before) == len(after):
        return [c for i, (x, y) in enumerate(zip(before, after, strict=True)) for c in changes(x, y, f"{path}.{i}")]
    return [] if before == after else [f"{path}: {before!r:.200} is now {after!r:.200}"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """Find the fake tensors that were made in this test and are still alive."""
    modes: weakref.WeakSet[FakeTensorMode] = weakref.WeakSet()  # a fake tensor holds its mode
    begin = FakeTensorMode.__init__

    def noted(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> None:
        begin(mode, *args, **kwargs)
        modes.add(mode)

    def alive() -> list[Any]:
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is FakeTensor and o.fake_mode in modes] if modes else []

    monkeypatch.setattr(FakeTensorMode, "__init__", noted)
    return alive


@pytest.fixture
def harmless(fakes: Callable[[], list[Any]]) -> Iterator[Callable[..., None]]:
    """Call it with everything that must not change; it is compared when the test ends."""
    roots: list[Any] = []
    before: list[Any] = []

    def watch(*things: Any) -> None:
        roots.extend(things)
        before.extend([frozen(roots), RandomState()])

    yield watch
    assert roots
    assert changes(before[0], frozen(roots)) == []
    assert before[1].equals(RandomState())
    assert fakes() == []
