"""Calls that the dispatcher does not see through are made again, or kept where that cannot be proven right."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.replay.helpers import PATH, assert_same, run
from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.replay.installed import Installed
from tightfit.replay.statistics import Statistics


class ByNumpy(torch.autograd.Function):
    """Fills its result, and something that only backward needs, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 2.0) -> Tensor:
        out, cosine = torch.empty_like(x), torch.empty_like(x)
        np.sin(x.detach().numpy() * scale, out=out.numpy())
        np.cos(x.detach().numpy() * scale, out=cosine.numpy())
        ctx.save_for_backward(cosine, x, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        cosine, x, out = ctx.saved_tensors
        return grad * cosine * ctx.scale + 0 * x * out, None


class ByAddress(torch.autograd.Function):
    """Copies at addresses, as a kernel does that is given pointers; the newer style, with a context apart."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), y.contiguous()
        first, second = torch.zeros_like(x), torch.empty_like(y)
        ctypes.memmove(first.data_ptr(), x.data_ptr(), x.numel() * x.itemsize)
        ctypes.memmove(second.data_ptr(), y.data_ptr(), y.numel() * y.itemsize)
        return first, second

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y, first, second = ctx.saved_tensors
        return gradients[0] * first.cos() + 0 * x, gradients[1] * second.sin() + 0 * y


class DroppingOut(torch.autograd.Function):
    """Draws from PyTorch's generator between two raw kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.empty_like(x)
        mask.numpy()[...] = torch.bernoulli(torch.full_like(x, 0.5)).numpy()
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        return grad * ctx.saved_tensors[0]


class Stashing(torch.autograd.Function):
    """Keeps tensors where no hook sees them: a result, something made on the way, and its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, half = torch.empty_like(x), x * 0.5
        np.tanh(x.detach().numpy(), out=out.numpy())
        ctx.out, ctx.pair, ctx.name = out, (half, 1.0), "tanh"
        ctx.x = x
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        half, one = ctx.pair
        assert ctx.name == "tanh"
        assert ctx.x.requires_grad
        return grad * (one - ctx.out**2) + 0 * half * ctx.x


class Unlike(torch.autograd.Function):
    """What `disturb` does to the result, the input or the world is not done a second time unseen."""

    disturb: Callable[[Tensor, Tensor], Any] = lambda x, out: None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[...] = x.detach().numpy() * 2
        Unlike.disturb(x, out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        return grad * ctx.saved_tensors[0]


by_numpy = ByNumpy.apply  # as users keep it


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (by_numpy(x @ w) @ w).tanh(),
        lambda x, w: by_numpy(by_numpy((x @ w).exp(), 3.0), 0.5) * x,
        lambda x, w: torch.stack(ByAddress.apply((x @ w).sin(), x.exp())).tanh(),
        lambda x, w: DroppingOut.apply((x @ w).sin()).exp(),
        lambda x, w: by_numpy((x @ w)[1:7, ::2].sin()).exp(),
    ],
)
def test_a_function_with_kernels_of_its_own_is_made_again(function: Any, calls: int) -> None:
    statistics = assert_same(function, calls=calls)
    assert statistics.refused_ops == 0
    assert statistics.dropped_slots >= 3


def everything_dropped(function: Any) -> Statistics:
    """What the engine did in the second call of a region, which relies on what its first call has found."""
    statistics = run(function, replay=True, calls=2).statistics
    assert statistics is not None
    return statistics


def test_all_that_such_a_function_makes_is_dropped() -> None:
    made = everything_dropped(lambda x, w: (by_numpy(x @ w) @ w).tanh())
    assert made.dropped_slots >= 5  # tanh, the matrix product's input, and what the function saves


@pytest.mark.parametrize("calls", [1, 2])
def test_what_a_function_keeps_in_its_context_is_dropped(calls: int) -> None:
    statistics = assert_same(lambda x, w: Stashing.apply((x @ w).exp()) @ w, calls=calls)
    assert statistics.dropped_slots >= 5  # of exp, of the product, and three of the function


def test_what_a_function_keeps_in_its_context_is_there_for_each_backward() -> None:
    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same(lambda x, w: Stashing.apply((x @ w).exp()) @ w, backward=twice)


def test_a_parameter_that_a_function_keeps_in_its_context_is_one_again() -> None:
    """As quantised layers keep their weights: what is made again has to be as many tensors as the first time."""
    frozen = torch.nn.Parameter(torch.randn(16), requires_grad=False)

    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.weight = weight
            assert type(weight) is torch.nn.Parameter
            out = torch.empty_like(x)
            np.multiply(x.detach().numpy(), weight.detach().numpy(), out=out.numpy())
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0] * ctx.weight, None

    statistics = assert_same(lambda x, w: Scaling.apply(x @ w, frozen).exp() @ w, calls=2)
    assert statistics.refused_ops == 0
    assert statistics.dropped_slots >= 2


def test_what_was_rebuilt_for_a_context_goes_with_its_backward() -> None:
    alive: list[Any] = []

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            alive.append(len([1 for kept in contexts if hasattr(kept, "out")]))
            return gradients[0]

    contexts: list[Any] = []

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = Stashing.apply(Looking.apply(x @ w))
        contexts[:] = [y.grad_fn]
        return y  # type: ignore[no-any-return]  # PyTorch's `apply` is not annotated

    assert_same(function)
    assert alive == [1, 0]  # plain keeps it as long as the graph lives


def test_what_the_engine_does_at_such_a_call_is_hidden_from_its_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of handed-out memory is asked at each attribute of a tensor that Python reads."""
    seen: list[Any] = []

    class Counting(MemoryWatch):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    monkeypatch.setattr("tightfit.replay.session.MemoryWatch", Counting)
    x = torch.randn(4, 4, requires_grad=True)
    with Counting(lambda _: None):
        by_numpy(x)
    users_own, seen[:] = list(seen), []
    installed = Installed(recipes={}, self_check=False)
    with installed.region(PATH):
        by_numpy(x)
    assert seen == users_own


def test_an_address_that_is_only_read_does_not_bar_others_from_reading_there() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).exp()
        return by_numpy(y) * y.sin()

    plain = everything_dropped(lambda x, w: (x @ w).exp().cos() * (x @ w).exp().sin())
    assert everything_dropped(function).dropped_slots >= plain.dropped_slots


_count = [0]
_buffer = torch.zeros(8, 16)


def other_bits(x: Tensor, out: Tensor) -> None:
    _count[0] += 1
    out.numpy()[...] += _count[0] % 7


def write_its_input(x: Tensor, out: Tensor) -> None:
    x.detach().numpy()[...] *= 0.5


def move_a_buffer(x: Tensor, out: Tensor) -> None:
    _buffer.add_(out)


def draw_elsewhere(x: Tensor, out: Tensor) -> None:
    random.random()
    np.random.rand()


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("disturb", [other_bits, write_its_input, move_a_buffer, draw_elsewhere])
def test_what_is_not_the_same_computation_is_kept(
    disturb: Callable[[Tensor, Tensor], None], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type("Unlike", (Unlike,), {"disturb": staticmethod(disturb)})  # what once differed stays barred
    monkeypatch.setattr(Unlike, "disturb", staticmethod(disturb))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return kind.apply((x @ w).sin()).exp()  # type: ignore[no-any-return]  # PyTorch's `apply` is not annotated

    found = []
    for replay in (False, True):
        _count[0] = 0
        _buffer.zero_()
        random.seed(0)
        np.random.seed(0)
        done = run(function, replay=replay, calls=calls)
        assert done.error is None
        found.append(({**done.tensors, "buffer": _buffer.clone()}, random.getstate(), np.random.rand(), _count[0]))
        if replay:
            assert done.statistics is not None
            assert calls > 1 or done.statistics.refused_ops == 1
    (plain, *world), (planned, *planned_world) = found
    if disturb is not other_bits:
        for name, tensor in plain.items():
            other = planned[name]
            assert (tensor is None and other is None) or torch.equal(tensor, other), name  # type: ignore[arg-type]  # both are there
        assert world[:2] == planned_world[:2]


def test_of_functions_with_one_name_only_that_which_differed_is_barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all compiled graphs have one name."""
    differing, alike = (type("Unlike", (Unlike,), {}) for _ in range(2))
    found = []
    for kind, disturb in ((differing, other_bits), (alike, lambda x, out: None), (differing, lambda x, out: None)):
        monkeypatch.setattr(Unlike, "disturb", staticmethod(disturb))
        done = run(lambda x, w, kind=kind: kind.apply((x @ w).sin()).exp(), replay=True)  # type: ignore[misc]  # a lambda has no types
        assert done.statistics is not None
        found.append((done.statistics.refused_ops, done.statistics.dropped_slots))
    assert [refused for refused, _ in found] == [1, 0, 0]
    assert found[1][1] > found[2][1]


def test_a_function_that_fails_leaves_the_region_usable() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            x.detach().numpy()
            raise ValueError

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).sin()
        with pytest.raises(ValueError):
            Failing.apply(y)
        return by_numpy(y).exp()  # type: ignore[no-any-return]  # PyTorch's `apply` is not annotated

    assert_same(function, calls=2)


def test_without_a_plan_pytorch_s_class_of_functions_is_as_it_was() -> None:
    kind = type(torch.autograd.Function)
    installed = Installed(recipes={})
    with installed.region(PATH):
        assert "__getattribute__" in vars(kind)
    assert "__getattribute__" not in vars(kind)


def lying(x: Tensor) -> Tensor:
    x.detach().numpy()[...] *= 2
    return x.detach().clone()


def counting(x: Tensor) -> Tensor:
    _count[0] += 1
    return x.detach() * _count[0]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kernel", [lying, counting])
def test_a_library_operator_that_is_not_what_its_schema_says_is_kept(
    kernel: Callable[[Tensor], Tensor], calls: int
) -> None:
    library = torch.library.Library("tightfit_tests", "FRAGMENT")
    library.define(f"{kernel.__name__}_{calls}(Tensor x) -> Tensor")
    library.impl(f"{kernel.__name__}_{calls}", kernel, "CPU")
    torch.library.register_autograd(
        f"tightfit_tests::{kernel.__name__}_{calls}", lambda ctx, grad: grad * 2, lib=library
    )
    operator = getattr(torch.ops.tightfit_tests, f"{kernel.__name__}_{calls}")
    try:
        found = []
        for replay in (False, True):
            _count[0] = 0
            done = run(lambda x, w: operator((x @ w).sin()).exp() * (x @ w).cos(), replay=replay, calls=calls)
            assert done.error is None
            found.append(done)
    finally:
        library._destroy()
    if kernel is lying:
        for name, tensor in found[0].tensors.items():
            assert torch.equal(tensor, found[1].tensors[name]), name  # type: ignore[arg-type]  # both are there
    assert found[1].statistics is not None
    assert calls > 1 or found[1].statistics.refused_ops == 1
