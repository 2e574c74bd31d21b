"""Recompute modules: a whole forward runs again in backward, as checkpointing does it, instead of a tape.

Where a block consists of many small operations and all that it saves is dropped, this costs less than a tape: nothing
is written down in forward, and no mode watches it.  But the module's Python code runs twice, which is only right where
a second forward is the same computation and leaves nothing behind.  That is promised for some kinds of modules
(`tightfit.operators.pure_modules`), and proven for all others at their first call (`module_proof`).  What a second call
finds is what the first one found (`module_state`).  Modules with hooks inside, or called with other things than tensors
and constants, take the tape.

What is looked at before forward runs a second time, where `torch.utils.checkpoint` does not look: that weights and
arguments are those of the first time.

Blind spots: a write that moves no version counter to a weight or to what autograd's graph explains (others are noticed
by their marks, see `tightfit.replay.source_mark`), and state outside of the module that changes between forward and
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from tightfit._torch_private.dispatch import find_overload, is_inside_transform
from tightfit._torch_private.libraries import library_switches, switched
from tightfit._torch_private.modules import own_buffers, own_parameters
from tightfit._torch_private.tensors import storage_key, version_of
from tightfit.device import device_for
from tightfit.device.generators import AS_IT_WAS, drawing_from
from tightfit.device.placement import generators_of, is_on_host
from tightfit.operators.autocast import autocast_of, casting_as
from tightfit.operators.facts import describe
from tightfit.operators.pure_modules import can_call_again, is_pure
from tightfit.records import Action, Recipe
from tightfit.replay.executors.arguments import Arguments
from tightfit.replay.executors.executor import RegionCall
from tightfit.replay.executors.module_proof import prove
from tightfit.replay.executors.module_state import NO_MOVES, ModuleState, Moves
from tightfit.replay.executors.second_call import SecondCall
from tightfit.replay.refusals import WRITTEN_BEHIND, changed_error, other_kernel_error
from tightfit.replay.source_mark import SourceMark, mark_of_source

#: A module's table of parameters, a name in it, and what is there.
_Weight = tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter | None]


class ModuleExecutor:
    """Makes a module's call again when backward first asks for one of its saved tensors."""

    name = "module"
    actions = frozenset({Action.RECOMPUTE})
    on_tape = False

    def accepts(self, call: RegionCall | None) -> bool:
        """Return whether a second call can be made as the first one was."""
        if call is None or is_inside_transform():  # in backward, it runs no more
            return False
        return can_call_again(call.modules, call.args, call.kwargs)

    def run(self, call: RegionCall, recipe: Recipe) -> Any:
        """Make the call."""
        return ModuleCall(call, len(recipe.replay), has_convolutions(recipe)).run()

    def find_moves(self, call: RegionCall, recipe: Recipe) -> Moves | None:
        """Return what the call moves, as promised or as a proof finds; None if it must not be made again."""
        operators = [find_overload(name) for name in set(recipe.op_names)]
        if is_pure(call.module) and not any(describe(one).needs_self_check for one in operators if one is not None):
            return NO_MOVES

        def again(moves: Moves, look: Callable[[Any], None]) -> None:
            call.moves = moves
            one = ModuleCall(call, 0, convolves=False)
            one.note_state()
            with one.as_it_was():
                look(one.call_again())

        return prove(call.module, (call.args, call.kwargs), device_for(call.module), again)


def has_convolutions(recipe: Recipe) -> bool:
    """Return whether a region runs convolutions, for which a library chooses among kernels."""
    return any("convolution" in name for name in recipe.op_names)


class ModuleCall:
    """One call of a module, made now and perhaps again in backward."""

    def __init__(self, call: RegionCall, op_count: int, convolves: bool) -> None:
        """By the plan, a second call runs `op_count` operations, and convolutions among them if it `convolves`."""
        self._convolves = convolves
        self._call = call
        self._arguments = Arguments(call.args, call.kwargs)
        self._op_count = op_count
        self._tensors: tuple[tuple[torch.Tensor, int, int], ...] = ()
        self._marks: list[tuple[torch.Tensor, SourceMark]] = []
        self._weights: list[_Weight] = []
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []

    def run(self) -> Any:
        """Make the call."""
        self.note_state()
        call = self._call
        made = partial(call.forward, *call.args, **call.kwargs)
        call.args, call.kwargs = (), {}  # what is held of them, `Arguments` says
        with call.inside():
            result = SecondCall(self._make_again, call.differs).first(made)
        # Only now is it known whether anything was random.
        self._random = [(one, state) for one, state in self._random if not torch.equal(one.get_state(), state)]
        return result

    def _make_again(self) -> None:
        self._check()
        statistics = self._call.statistics
        statistics.recomputed_calls += 1
        statistics.replayed_ops += self._op_count
        with self.as_it_was():
            self.call_again()

    def note_state(self) -> None:
        """Note what the call finds."""
        call = self._call
        below = call.modules
        self._state = ModuleState(call.module, below, call.moves)
        self._switches = library_switches()
        moving = {id(buffer) for buffer in self._state.buffers}
        self._weights = _weights_of(below)
        watched: list[torch.Tensor | None] = [weight for _, _, weight in self._weights]
        for one in below:
            watched += [buffer for buffer in own_buffers(one).values() if id(buffer) not in moving]
        tensors = [(tensor, tensor) for tensor in watched if tensor is not None] + self._arguments.take_tensors()
        self._tensors = tuple([(held, storage_key(held), version_of(held)) for _, held in tensors])
        marks = [(held, mark_of_source(tensor, {})) for tensor, held in tensors]
        self._marks = [(held, mark) for held, mark in marks if mark is not None]
        elsewhere = (device_for(tensor).kind for tensor, _ in tensors if not is_on_host(tensor))
        self._autocast = autocast_of(next(elsewhere, "cpu"))
        self._random = [(generator, generator.get_state()) for generator in generators_of(t for t, _ in tensors)]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Put back what the call found, inside."""
        with AS_IT_WAS, ExitStack() as stack:
            if library_switches() != self._switches:
                stack.enter_context(switched(self._switches))
            stack.enter_context(casting_as(self._autocast))
            for weights, name, then in self._weights:
                if weights[name] is not then:  # it was called with others (`torch.func.functional_call`)
                    stack.callback(weights.__setitem__, name, weights[name])
                    weights[name] = then
            stack.enter_context(self._state.as_it_was())
            for generator, state in self._random:
                stack.enter_context(drawing_from(generator, state))
            yield

    def call_again(self) -> Any:
        """Run the module's forward once more."""
        call = self._call
        args, kwargs = self._arguments.again()
        with call.inside():
            return call.forward(*args, **kwargs)

    def _check(self) -> None:
        if self._convolves:
            for device in {device_for(tensor) for tensor, _, _ in self._tensors}:
                if reason := device.convolutions_differ_by_thread():
                    raise other_kernel_error("convolutions", reason)
        for tensor, key, version in self._tensors:
            if storage_key(tensor) != key:
                raise changed_error(
                    tensor, "by giving it other memory (.data = ...) after the region that used it ended"
                )
            if version_of(tensor) != version:
                raise changed_error(tensor, "in place after the region that used it ended")
        marks, self._marks = self._marks, []
        for tensor, mark in marks:
            if mark.still_fits(tensor):
                continue
            if mark.contents is None:
                self._call.refuse(tensor)
                raise changed_error(tensor, WRITTEN_BEHIND)
            self._state.found(tensor, mark.contents)


def _weights_of(modules: Iterable[torch.nn.Module]) -> list[_Weight]:
    tables = map(own_parameters, modules)
    return [(weights, name, weight) for weights in tables for name, weight in weights.items()]
