"""Make a call of an opaque function again: with the same inputs, random state and surroundings.

What such a call makes is a list of tensors: its results, then what it has autograd save, in order.  The first call and
those made again have the same list, if they are the same computation; `tightfit.replay.repeats` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from tightfit._torch_private import DispatchMode, below_autograd, current_dispatch_keys, dispatching_by, storage_key
from tightfit.device.device import Device
from tightfit.device.generators import drawing_from
from tightfit.operators.facts import describe, mutated_tensors, result_tensors, tensors_in, undeclared_writes


class WritesElsewhere(RuntimeError):
    """An opaque call was about to write a tensor that it has not made itself."""


class OpaqueCall:
    """One call of an `autograd.Function`, to be made again."""

    __slots__ = ("_attributes", "_autocast", "_function", "_generators", "_keys", "_needs_grad", "_random", "length")

    def __init__(self, function: Any, args: tuple[Any, ...], device: Device, generators: list[torch.Generator]) -> None:
        """Note, before a call of `function`, what surrounds it."""
        tensors = tensors_in(args)
        self._function = function
        self._keys = current_dispatch_keys()
        self._autocast = {kind: _autocast(kind) for kind in {"cpu", device.kind}}
        self._needs_grad = [tensor.requires_grad for tensor in tensors]
        self._attributes = [vars(tensor).copy() for tensor in tensors]
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self.length = 0
        """How many tensors it makes."""

    def made(self, tensors: list[torch.Tensor]) -> None:
        """Note, after the call, what it has made, and from which generators it has drawn."""
        self.length = len(tensors)
        with below_autograd():  # only now is it known whether anything was random
            self._random = [pair for pair in self._generators if not torch.equal(pair[0].get_state(), pair[1])]
        self._generators = []

    @property
    def random_state_bytes(self) -> int:
        """Bytes of the random states that it keeps."""
        return sum(state.numel() for _, state in self._random)

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Make the call again; return what it makes."""
        return self._call(args, watched=False)

    def watched(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Make the call again, unless it writes what it has not made.

        Raises:
            WritesElsewhere: it was about to.
        """
        return self._call(args, watched=True)

    def _call(self, args: tuple[Any, ...], *, watched: bool) -> tuple[torch.Tensor, ...]:
        saved: list[torch.Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(dispatching_by(self._keys))
            for kind, (dtype, enabled) in self._autocast.items():
                # Weights that are cast anew have the same bits; the cache is the forward's.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            for generator, state in self._random:
                stack.enter_context(drawing_from(generator, state))
            stack.enter_context(torch.enable_grad())
            # A node that holds its own result would keep itself alive, as nobody will run its backward.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.append, _refuse))
            stack.enter_context(_FreshWrites() if watched else nullcontext())
            try:
                tensors = what_it_made(self._function.apply(*self._as_they_were(args)), saved)
            finally:
                saved.clear()  # the nodes hold the hooks, and these the list: a result in it would never be freed
        if len(tensors) != self.length:
            raise RuntimeError(
                f"calling {self._function.__qualname__} again made {len(tensors)} tensors instead of {self.length}: it "
                "is not a function of its inputs, and what autograd saved of it cannot be rebuilt. Leave the module "
                "that calls it untouched: fit(..., exclude=module), or a pattern of its path."
            )
        return tuple(tensors)

    def _as_they_were(self, args: tuple[Any, ...]) -> Any:
        states = zip(self._needs_grad, self._attributes, strict=True)

        def again(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                needs_grad, attributes = next(states)
                fresh = argument.detach().requires_grad_(needs_grad)
                vars(fresh).update(attributes)
                return fresh
            if isinstance(argument, list | tuple):
                return type(argument)([again(part) for part in argument])
            return argument

        return [again(argument) for argument in args]


def what_it_made(result: Any, saved: list[torch.Tensor]) -> list[torch.Tensor]:
    """List what a call made: its results and what it has autograd save."""
    return [made for made in (*result_tensors(result), *saved) if isinstance(made, torch.Tensor)]


def _refuse(_: object) -> torch.Tensor:
    raise RuntimeError("a call that is made again has no backward")


def _autocast(kind: str) -> tuple[torch.dtype, bool]:
    return torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


class _FreshWrites(DispatchMode):
    """Lets operations write only what was made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.Tensor] = {}  # held, so that no address is given twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        info = describe(func)
        for tensor in (*mutated_tensors(info, args, kwargs), *undeclared_writes(info, args)):
            if storage_key(tensor) not in self._made:
                raise WritesElsewhere(f"{info.name} writes a tensor that the call has not made")
        result = func(*args, **kwargs)
        if not info.is_view:
            self._made.update((storage_key(tensor), tensor) for tensor in _strided(result))
        return result


def _strided(result: Any) -> Iterator[torch.Tensor]:
    return (t for t in result_tensors(result) if isinstance(t, torch.Tensor) and t.layout is torch.strided)
