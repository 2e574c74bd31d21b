"""Recompute modules: a whole forward runs again in backward, by PyTorch's checkpoint, instead of a tape.

Where a block consists of many small operations and all that it saves is dropped, this costs less than a tape: nothing
is written down in forward, and no mode watches it.  But the module's Python code runs twice, which is only right where
a second forward is the same computation and leaves nothing behind.  That is promised for some kinds of modules
(`tightfit.operators.pure_modules`), and proven for all others at their first call (`module_proof`).  What a second call
finds is what the first one found (`module_state`).  Modules with hooks inside, or called with other things than tensors
and constants, take the tape.

What is looked at before forward runs a second time, because `torch.utils.checkpoint` does not look: that weights and
arguments are those of the first time.

Blind spots: a write that moves no version counter (`.data`, NumPy) to a weight or an argument, and state outside of the
module that changes between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tightfit._torch_private import (
    find_overload,
    library_switches,
    own_buffers,
    own_parameters,
    storage_key,
    switched,
    version_of,
)
from tightfit.device import device_for
from tightfit.device.generators import drawing_from
from tightfit.device.placement import generators_of
from tightfit.operators.facts import describe
from tightfit.operators.pure_modules import can_call_again, is_pure
from tightfit.records import Action, Recipe
from tightfit.replay.executors.executor import RegionCall
from tightfit.replay.executors.module_proof import prove
from tightfit.replay.executors.module_state import NO_MOVES, ModuleState, Moves
from tightfit.replay.refusals import changed_error, other_kernel_error


class ModuleExecutor:
    """Makes a module's call again when backward first asks for one of its saved tensors."""

    name = "module"
    actions = frozenset({Action.RECOMPUTE})
    on_tape = False

    def accepts(self, call: RegionCall | None) -> bool:
        """Return whether a second call can be made as the first one was."""
        return call is not None and can_call_again(call.module, call.args, call.kwargs)

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
            one.note_state(call.args)
            with one.as_it_was():
                look(one.call_forward(*call.args))

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
        self._args = call.args
        self._op_count = op_count
        self._tensors: tuple[tuple[torch.Tensor, int, int], ...] = ()
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self._is_first = True

    def run(self) -> Any:
        """Make the call."""
        args, self._args, self._call.args = self._args, (), ()  # from here on, checkpoint has them
        return checkpoint(self, *args, use_reentrant=False, preserve_rng_state=False)

    def __call__(self, *args: Any) -> Any:
        """Run forward, as `checkpoint` asks: in forward, and in backward when something is read."""
        if self._is_first:
            self._is_first = False
            self.note_state(args)
            result = self.call_forward(*args)
            # Only now is it known whether anything was random.
            self._random = [(one, state) for one, state in self._random if not torch.equal(one.get_state(), state)]
            return result
        self._check()
        statistics = self._call.statistics
        statistics.recomputed_calls += 1
        statistics.replayed_ops += self._op_count
        with self.as_it_was():
            return self.call_forward(*args)

    def note_state(self, args: tuple[Any, ...]) -> None:
        """Note what the call finds."""
        call = self._call
        self._state = ModuleState(call.module, call.moves)
        self._switches = library_switches()
        moving = {id(buffer) for buffer in self._state.buffers}
        watched: list[torch.Tensor | None] = []
        for below in call.module.modules():
            watched += own_parameters(below).values()
            watched += [buffer for buffer in own_buffers(below).values() if id(buffer) not in moving]
        watched += _tensors_in((args, call.kwargs))
        tensors = [tensor for tensor in watched if tensor is not None]
        self._tensors = tuple([(tensor, storage_key(tensor), version_of(tensor)) for tensor in tensors])
        self._random = [(generator, generator.get_state()) for generator in generators_of(tensors)]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Put back what the call found, inside."""
        with ExitStack() as stack:
            stack.enter_context(switched(self._switches))
            stack.enter_context(self._state.as_it_was())
            for generator, state in self._random:
                stack.enter_context(drawing_from(generator, state))
            yield

    def call_forward(self, *args: Any) -> Any:
        """Run the module's forward."""
        call = self._call
        with call.inside():
            return call.forward(*args, **call.kwargs)

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


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, tuple | list):
        return [tensor for argument in arguments for tensor in _tensors_in(argument)]
    return [t for argument in arguments.values() for t in _tensors_in(argument)] if isinstance(arguments, dict) else []
