"""Make a call of an opaque function again: with the same inputs, random state and surroundings.

What such a call makes is a list of tensors: its results, then what it has autograd save, in order.  The first call and
those made again have the same list, if they are the same computation; `tightfit.replay.repeats` compares the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from tightfit._torch_private.autograd import no_saved_tensor_hooks, node_class_of
from tightfit._torch_private.dispatch import DispatchMode, below_autograd, current_dispatch_keys, dispatching_by
from tightfit._torch_private.tensors import storage_key
from tightfit.device.device import Device
from tightfit.device.generators import drawing_from
from tightfit.operators.facts import describe, mutated_tensors, result_tensors, tensors_in, undeclared_writes
from tightfit.operators.function_calls import is_compiled_graph
from tightfit.operators.stashed_tensors import stashed_in
from tightfit.operators.wrapper_tensors import any_wrapper


class WritesElsewhere(RuntimeError):
    """An opaque call was about to write a tensor that it has not made itself."""


class OpaqueCall(ABC):
    """One opaque call, to be made again."""

    __slots__ = ("_autocast", "_generators", "_keys", "_random")

    def __init__(self, device: Device, generators: list[torch.Generator]) -> None:
        """Note, before the call is made on a device, what surrounds it; from which generators it may draw."""
        self._keys = current_dispatch_keys()
        kinds = {kind for kind in ("cpu", device.kind) if torch.is_autocast_enabled(kind)}
        self._autocast = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []

    def done(self) -> None:
        """Note that the call has been made: from which generators it has drawn."""
        with below_autograd():  # only now is it known whether anything was random
            self._random = [pair for pair in self._generators if not torch.equal(pair[0].get_state(), pair[1])]
        self._generators = []

    @property
    def random_state_bytes(self) -> int:
        """Bytes of the random states that it keeps."""
        return sum(state.numel() for _, state in self._random)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call again; return what it makes."""
        with self._surroundings():
            return self._run(args, kwargs, nullcontext())

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call again, unless it writes what it has not made.

        Raises:
            WritesElsewhere: it was about to.
        """
        with self._surroundings():
            return self._run(args, kwargs, _FreshWrites())

    @abstractmethod
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: AbstractContextManager[object]) -> Any:
        """Make the call; inside `watch`, if it runs operations that show."""

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(dispatching_by(self._keys))
            for kind, dtype in self._autocast.items():
                # Weights that are cast anew have the same bits; the cache is the forward's.
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            for generator, state in self._random:
                stack.enter_context(drawing_from(generator, state))
            yield


class OperatorCall(OpaqueCall):
    """A call of an operator that is not PyTorch's own."""

    __slots__ = ("_func",)

    def __init__(self, func: Any, device: Device, generators: list[torch.Generator]) -> None:
        super().__init__(device, generators)
        self._func = func

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: AbstractContextManager[object]) -> Any:
        return self._func(*args, **kwargs)  # it says itself what it writes, and its inputs are compared


class FunctionCall(OpaqueCall):
    """A call of an `autograd.Function`."""

    __slots__ = ("_are_parameters", "_attributes", "_length", "_needs_grad", "function")

    def __init__(self, function: Any, args: tuple[Any, ...], device: Device, generators: list[torch.Generator]) -> None:
        super().__init__(device, generators)
        tensors = tensors_in(args)
        self.function = function
        self._needs_grad = [tensor.requires_grad for tensor in tensors]
        # A forward may ask whether it is given a parameter, and what it keeps of one in its context is no activation.
        self._are_parameters = [isinstance(tensor, torch.nn.Parameter) for tensor in tensors]
        self._attributes = [vars(tensor).copy() for tensor in tensors]
        self._length = 0

    def made(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that the call has been made, and what it has made."""
        self.done()
        self._length = len(tensors)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: AbstractContextManager[object]) -> Any:
        if is_compiled_graph(self.function):
            watch = nullcontext()  # its memory is not made by operations that show; what it writes, it says
        # No hooks collect what is saved, as forward may have `torch.func` inside, which forbids them.
        with torch.enable_grad(), no_saved_tensor_hooks(), watch:
            result = self.function.apply(*self._as_they_were(args))
        node = self._context_of(result)
        saved = [tensor.detach() for tensor in node.saved_tensors if tensor is not None] if node is not None else []
        tensors = what_it_made(result, [*saved, *stashed_in(node)])
        del node, result
        if self.function.setup_context is not torch.autograd.Function.setup_context:
            del tensors[self._length :]  # which saves after the call, and only what was given or has come out
        if len(tensors) != self._length:
            raise RuntimeError(
                f"calling {self.function.__qualname__} again made {len(tensors)} tensors instead of {self._length}: "
                "it is not a function of its inputs, and what autograd saved of it cannot be rebuilt. Leave the module "
                "that calls it untouched: fit(..., exclude=module), or a pattern of its path."
            )
        return tuple(tensors)

    def _context_of(self, result: Any) -> Any:
        nodes = [made.grad_fn for made in result_tensors(result) if isinstance(made, torch.Tensor)]
        return next((node for node in nodes if isinstance(node, node_class_of(self.function))), None)

    def _as_they_were(self, args: tuple[Any, ...]) -> Any:
        states = zip(self._needs_grad, self._are_parameters, self._attributes, strict=True)

        def again(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                needs_grad, is_parameter, attributes = next(states)
                fresh = argument.detach().requires_grad_(needs_grad)
                if is_parameter:
                    fresh = torch.nn.Parameter(fresh, needs_grad)
                vars(fresh).update(attributes)
                return fresh
            if isinstance(argument, list | tuple):
                return type(argument)([again(part) for part in argument])
            return argument

        return [again(argument) for argument in args]


def function_of(call: object) -> Any:
    """Return the class of the `autograd.Function` that is called; None where another operation is."""
    return call.function if isinstance(call, FunctionCall) else None


def what_it_made(result: Any, saved: list[torch.Tensor]) -> list[torch.Tensor]:
    """List what a call made: its results, and what it has autograd save or keeps in its context."""
    return [made for made in (*result_tensors(result), *saved) if isinstance(made, torch.Tensor)]


class _FreshWrites(DispatchMode):
    """Lets operations write only what was made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.Tensor] = {}  # held, so that no address is given twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any_wrapper(types, args):
            return NotImplemented
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
