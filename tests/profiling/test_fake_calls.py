"""A call on tensors without data that is like an earlier one: its result is the one that PyTorch would make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tightfit
from tests.suite import build
from tightfit._torch_private.dispatch import FakeTensorMode, fake_mode
from tightfit._torch_private.fake_calls import FakeCalls
from tightfit.operators.facts import result_tensors
from tightfit.profiling import observer

aten = torch.ops.aten

#: Operations with arguments that PyTorch remembers the results of: new tensors, views, several at once, in place.
REMEMBERED: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "mm": (aten.mm.default, lambda: (torch.empty(3, 4), torch.empty(4, 5)), {}),
    "of a transposed one": (aten.relu.default, lambda: (torch.empty(4, 3).t(),), {}),
    "by an integer": (aten.mul.Tensor, lambda: (torch.ones(3, dtype=torch.int64), 2), {}),
    "transposed": (aten.t.default, lambda: (torch.empty(3, 4),), {}),
    "a view of a view": (aten.view.default, lambda: (torch.empty(6, 4)[2:4], [8]), {}),
    "strided": (aten.as_strided.default, lambda: (torch.empty(6, 4), [2, 2], [1, 4], 3), {}),
    "expanded": (aten.expand.default, lambda: (torch.empty(3, 1), [3, 4]), {}),
    "in place": (aten.add_.Tensor, lambda: (torch.empty(3, 4), torch.empty(4)), {}),
    "several": (aten.native_layer_norm.default, lambda: (torch.empty(3, 4), [4], None, None, 1e-5), {}),
    "reduced": (aten.sum.dim_IntList, lambda: (torch.empty(3, 4), [0], True), {"dtype": torch.float64}),
    "convolved": (
        aten.convolution.default,
        lambda: (torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        {},
    ),
    "complex": (aten.mul.Tensor, lambda: (torch.empty(3, dtype=torch.complex64), 2j), {}),
}


def described(result: Any, args: tuple[Any, ...]) -> list[Any]:
    """All that a step's observation asks of results, and which argument each is, or shares memory with."""
    found = []
    for tensor in result_tensors(result):
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        memory = tensor.untyped_storage()
        found.append(
            (
                type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device,
                memory.nbytes(), tensor.is_conj(), tensor.is_neg(), tensor.requires_grad, tensor.fake_mode,
                [one is tensor for one in tensors],
                [one.untyped_storage()._cdata == memory._cdata for one in tensors],
                torch._C._dispatch_keys(tensor),
            )
        )  # fmt: skip
    return found


def call(calls: FakeCalls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return calls.call(func, args, kwargs, calls.known_by(func, args, kwargs))


@pytest.mark.parametrize("name", REMEMBERED)
def test_a_remembered_call_gives_what_pytorch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    func, make, kwargs = REMEMBERED[name]
    mode = fake_mode()
    calls = FakeCalls(mode)
    with torch.no_grad(), mode:
        args = make()
        plain = described(func(*args, **kwargs), args)
        args = make()
        first = described(call(calls, func, args, kwargs), args)
        args = make()
        monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *_: pytest.fail("PyTorch was asked again"))
        again = described(call(calls, func, args, kwargs), args)
    assert first == plain
    assert again == plain


def test_what_a_result_may_depend_on_makes_another_call() -> None:
    mode = fake_mode()
    calls = FakeCalls(mode)
    with torch.no_grad(), mode:
        x, y = torch.empty(4, 4), torch.empty(8, 4)
        others = [
            (x, 1), (x, 1.0), (x, True), (x, -0.0), (x, 0.0), (x, None), (x, [1]), (x, (1,)), (x, torch.float32),
            (y[:4], 1), (y[4:], 1), (x.t(), 1), (x.double(), 1), (x[:2], 1), (x.clone().requires_grad_(), 1),
            (torch.empty(4, 4, dtype=torch.complex64).conj(), 1),
        ]  # fmt: skip
        known = [calls.known_by(aten.add.Tensor, args, {}) for args in others]
        known.append(calls.known_by(aten.sub.Tensor, (x, 1), {}))
        known.append(calls.known_by(aten.add.Tensor, (x, 1), {"alpha": 2}))
        assert None not in known
        assert len(set(known)) == len(known)
        torch.set_default_dtype(torch.float64)
        try:
            assert calls.known_by(aten.add.Tensor, (x, 1), {}) not in known
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_is_not_of_the_mode_alone_is_left_to_pytorch() -> None:
    mode, other = fake_mode(), fake_mode()
    calls = FakeCalls(mode)
    with_data = torch.ones(3)
    with other:
        theirs = torch.empty(3)
        assert calls.known_by(aten.relu.default, (theirs,), {}) is None
    with mode:
        assert calls.known_by(aten.relu.default, (theirs,), {}) is None
        assert calls.known_by(aten.relu.default, (with_data,), {}) is None
        assert calls.known_by(aten.bernoulli.default, (torch.empty(3),), {"generator": torch.Generator()}) is None
    assert calls.known_by(aten.relu.default, (theirs,), {}) is None  # the mode is off
    assert FakeCalls(None).known_by(aten.relu.default, (theirs,), {}) is None


def test_a_call_that_pytorch_does_not_remember_is_made_again() -> None:
    mode = fake_mode()
    calls = FakeCalls(mode)
    with torch.no_grad(), mode:
        for _ in range(2):
            x = torch.empty(3, 4)
            call(calls, aten.t_.default, (x,), {})  # it changes its argument's own geometry
            assert x.shape == (4, 3)


@pytest.mark.parametrize("name", ["convnext", "rnn-loop", "gpt", "tied"])
def test_an_observed_step_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(name)

    def measured() -> tightfit.Profile:
        return tightfit.measure(case.model, case.batch, loss=case.loss, optimizer=case.optimizers())

    ours = measured()
    monkeypatch.setattr(observer, "FakeCalls", lambda _: FakeCalls(None))
    theirs = measured()
    assert ours.events == theirs.events
    assert ours.storages == theirs.storages
    assert ours.values == theirs.values
    assert ours.ops == theirs.ops
    assert ours.signatures == theirs.signatures
