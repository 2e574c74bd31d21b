"""Recompute modules: a whole forward runs again in backward, by PyTorch's checkpoint, instead of a tape.

Where a block consists of many small operations and all that it saves is dropped, this costs less than a tape: nothing
is written down in forward, and no mode watches it.  But the module's Python code runs twice, which is only right where
a second forward is the same computation and leaves nothing behind.  So it is done only for modules of kinds that are
known to be like that (and tested), without hooks, called with tensors and constants; all others take the tape.

What is looked at before forward runs a second time, because `torch.utils.checkpoint` does not look: that weights,
arguments and the modules' modes are those of the first time.

Blind spots: a write that moves no version counter (`.data`, NumPy) to a weight or an argument, and a change of other
attributes of a module (a dropout's probability) between forward and backward.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tightfit._torch_private import own_buffers, own_parameters, storage_key, version_of
from tightfit.device import device_for
from tightfit.device.generators import drawing_from
from tightfit.device.placement import generators_of
from tightfit.operators.pure_modules import can_call_again
from tightfit.records import Action, Recipe
from tightfit.replay.executors.executor import RegionCall
from tightfit.replay.refusals import CannotRebuild, changed_error, other_kernel_error


class ModuleExecutor:
    """Makes a module's call again when backward first asks for one of its saved tensors."""

    name = "module"
    actions = frozenset({Action.RECOMPUTE})
    on_tape = False

    def accepts(self, call: RegionCall | None) -> bool:
        """Return whether a second call would be the same computation and leave nothing behind."""
        return call is not None and can_call_again(call.module, call.args, call.kwargs)

    def run(self, call: RegionCall, recipe: Recipe) -> Any:
        """Make the call."""
        return ModuleCall(call, len(recipe.replay), has_convolutions(recipe)).run()


def has_convolutions(recipe: Recipe) -> bool:
    """Return whether a region runs convolutions, for which a library chooses among kernels."""
    return any("convolution" in name for name in recipe.op_names)


class ModuleCall:
    """One call of a module, made now and perhaps again in backward."""

    def __init__(self, call: RegionCall, op_count: int, convolves: bool) -> None:
        """By the plan, a second call runs `op_count` operations, and convolutions among them if it `convolves`."""
        self._convolves = convolves
        self._forward = call.forward
        self._args = call.args
        self._kwargs = call.kwargs
        self._statistics = call.statistics
        self._op_count = op_count
        self._modules = tuple(call.module.modules())
        self._modes = tuple([below.training for below in self._modules])
        self._tensors: tuple[tuple[torch.Tensor, int, int], ...] = ()
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self._is_first = True

    def run(self) -> Any:
        """Make the call."""
        args, self._args = self._args, ()  # from here on, checkpoint has them
        return checkpoint(self, *args, use_reentrant=False, preserve_rng_state=False)

    def __call__(self, *args: Any) -> Any:
        """Run forward, as `checkpoint` asks: in forward, and in backward when something is read."""
        if self._is_first:
            self._is_first = False
            return self._run_first(args)
        self._check()
        self._statistics.recomputed_calls += 1
        self._statistics.replayed_ops += self._op_count
        with ExitStack() as stack:
            for generator, state in self._random:
                stack.enter_context(drawing_from(generator, state))
            return self._forward(*args, **self._kwargs)

    def _run_first(self, args: tuple[Any, ...]) -> Any:
        watched = [
            t for below in self._modules for t in (*own_parameters(below).values(), *own_buffers(below).values())
        ]
        watched += _tensors_in((args, self._kwargs))
        tensors = [tensor for tensor in watched if tensor is not None]
        self._tensors = tuple([(tensor, storage_key(tensor), version_of(tensor)) for tensor in tensors])
        generators = generators_of(tensors)
        states = [generator.get_state() for generator in generators]
        result = self._forward(*args, **self._kwargs)
        # Only now is it known whether anything was random.
        self._random = [
            (generator, state)
            for generator, state in zip(generators, states, strict=True)
            if not torch.equal(generator.get_state(), state)
        ]
        return result

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
        if tuple([below.training for below in self._modules]) != self._modes:
            raise CannotRebuild(
                "tightfit cannot rebuild saved tensors: model.train() or model.eval() was called between forward and "
                "backward, and a block that is recomputed in backward would now compute something else. Call them "
                "before forward or after backward."
            )


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, tuple | list):
        return [tensor for argument in arguments for tensor in _tensors_in(argument)]
    return [t for argument in arguments.values() for t in _tensors_in(argument)] if isinstance(arguments, dict) else []
