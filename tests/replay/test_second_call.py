"""A module's call of which autograd holds nothing: what its second call finds, ends with, and leaves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.replay.executors.executor import RegionCall
from tightfit.replay.executors.module import ModuleCall
from tightfit.replay.executors.second_call import SecondCall
from tightfit.replay.statistics import Statistics


class Calling(nn.Module):
    """Runs a function, and counts."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def called(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    module = Calling(function)
    call = RegionCall(module, module.forward, args, kwargs, Statistics())
    result: Tensor = ModuleCall(call, 0, convolves=False).run()
    return result


def leaf() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_arguments_that_are_one_tensor_are_one_again_and_have_their_attributes() -> None:
    seen = []

    def function(x: Tensor, *, pair: list[Tensor]) -> Tensor:
        seen.append((x is pair[0], x.requires_grad, x.is_leaf or x.grad_fn is not None, vars(x).get("mark")))
        return x.sin() * pair[0].exp()

    y = leaf() * 1.0
    y.mark = "kept"  # type: ignore[attr-defined]  # as users do
    called(function, y, pair=[y]).sum().backward()
    assert seen == [(True, True, True, "kept")] * 2


def test_hooks_that_a_module_puts_on_its_arguments_run_once() -> None:
    ran: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        x.register_hook(ran.append)
        return x.sin().exp()

    called(function, leaf() * 1.0).sum().backward()
    assert len(ran) == 1


def test_the_second_call_ends_with_the_last_tensor_that_is_wanted() -> None:
    after: list[None] = []

    def function(x: Tensor) -> Tensor:
        y = x.sin()
        try:
            y = y.exp()
        except Exception:  # as a module may have it: it hears nothing of the end
            raise AssertionError from None
        after.append(None)
        return y + 1

    called(function, leaf()).sum().backward()
    assert len(after) == 1


def test_a_backward_that_keeps_the_graph_leaves_nothing_of_the_second_call() -> None:
    x, w = leaf(), leaf()
    call = SecondCall(lambda: (x.sin() * w.exp()).sum())
    loss = call.first(lambda: (x.sin() * w.exp()).sum())
    (plain,) = torch.autograd.grad((x.sin() * w.exp()).sum(), w)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, w, retain_graph=True)  # what x alone needs stays unread
        assert torch.equal(found, plain)
        assert not call._made
    node = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # it has one
    assert torch.equal(node._saved_self, node._saved_self)  # each look makes the call again
    assert not call._made


def test_a_call_goes_with_its_graph_though_its_argument_came_to_have_it_in_its_history() -> None:
    x = leaf() * 1.0
    died = weakref.ref(x)
    gc.disable()
    try:
        x.add_(called(lambda x: x.sin().exp(), x))
        del x
        assert died() is None
    finally:
        gc.enable()
