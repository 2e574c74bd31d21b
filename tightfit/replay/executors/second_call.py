"""Let autograd hold nothing that a call saves, and make the call again when backward first asks for some of it.

As `torch.utils.checkpoint` does without its reentrant form, but with little to do for each saved tensor: what that
takes is most of what recomputing small modules costs.  The second call ends with the last tensor that is still wanted.
In a backward that keeps its graph, what is left is let go of at its end, and the next one makes the call anew.

Blind spot, as checkpointing has it: a saved tensor that is written after it was saved is recomputed as it was saved,
where plain autograd refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.autograd import backward_keeps_graph, call_after_backward, current_graph_task
from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import outside_batched_backward
from tightfit._torch_private.tensors import alias, alias_outside_dispatch
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.replay.refusals import CannotRebuild, failed_call_error, other_call_error

_Tensor = torch.Tensor


class _Enough(BaseException):
    """The second call has saved all that is wanted; no `except Exception` of the module's is to hear of it."""


class _Place:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("call", "dtype", "index", "size")

    def __init__(self, call: SecondCall, index: int, tensor: _Tensor) -> None:
        self.call = call
        self.index = index  # among the tensors that the call saves
        self.size = tensor.size()
        self.dtype = tensor.dtype

    def __del__(self) -> None:
        self.call.release(self.index)


class SecondCall:
    """The tensors that one call saves, of which none is held."""

    def __init__(self, again: Callable[[], object], differs: Callable[[], object] = lambda: None) -> None:
        """`again` makes the call again; it is told of no result. `differs` is told where that is another call."""
        self._again = again
        self._differs = differs
        self._count = 0
        self._wanted: set[int] = set()  # places
        self._made: dict[int, _Tensor] = {}  # by place, what the second call has saved
        self._graph_task = -1

    def first(self, call: Callable[[], Any]) -> Any:
        """Make the call, of which autograd is to hold nothing; return its result."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return call()

    @never_compiled
    def _pack(self, tensor: _Tensor) -> _Place:
        index = self._count
        self._count += 1
        self._wanted.add(index)
        return _Place(self, index, tensor)

    def release(self, index: int) -> None:
        """Note that nobody wants a tensor any more."""
        self._wanted.discard(index)
        self._made.pop(index, None)

    def read(self, place: _Place) -> _Tensor:
        """Return the tensor that was saved there."""
        if place.index not in self._made:
            self._make_again()
        found = self._made.pop(place.index, None)
        if found is None or found.size() != place.size or found.dtype != place.dtype:
            self._differs()
            raise other_call_error(place.dtype, place.size, found)
        graph_task = current_graph_task()
        if graph_task < 0:  # somebody looks at a node
            self._made.clear()
        elif graph_task != self._graph_task and backward_keeps_graph():
            self._graph_task = graph_task
            call_after_backward(self._forget)
        return found

    def _forget(self) -> None:
        """Let go of what a backward that keeps its graph has not read."""
        self._made.clear()

    def _make_again(self) -> None:
        made = self._made = {}
        wanted, last, index = self._wanted, max(self._wanted), -1

        @never_compiled
        def pack(tensor: _Tensor) -> _Tensor:
            nonlocal index
            index += 1
            # Without its history, which would keep the second call's graph alive.
            plain = type(tensor) is _Tensor or type(tensor) is torch.nn.Parameter
            saved = alias_outside_dispatch(_Tensor, tensor) if plain else alias(tensor)
            if index in wanted:
                made[index] = saved
            if index == last:
                raise _Enough
            return saved

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is)
        try:
            with torch.enable_grad(), outside_batched_backward(), hooks:
                self._again()
        except _Enough:
            pass
        except CannotRebuild:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._differs()
            raise failed_call_error(error) from error


@never_compiled
def _unpack(place: _Place) -> _Tensor:
    return place.call.read(place)


@never_compiled
def _as_it_is(tensor: _Tensor) -> _Tensor:
    return tensor
