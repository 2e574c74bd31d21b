"""Repeat calls that are not known to give the same bits twice, until their kind is trusted.

An operation outside the known-good list is run again at once, from copies of what it writes and the same random state:
results must have the same bits, and its inputs must be as before.  Where kernels add atomically, that is done several
times, some of them beside other work on the device, as the order of such additions is a matter of chance; and it is
done for each kind of call, since kernels are chosen by shape.  A kind of call that once differed is barred.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from tightfit._torch_private.autograd import set_grad_mode
from tightfit._torch_private.dispatch import below_autograd
from tightfit.device import Device
from tightfit.device.generators import drawing_from
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.device.placement import device_of_call
from tightfit.operators.differing_calls import CHANGED_INPUTS, DREW_UNSEEN, GAVE_OTHER_BITS, bar, kind_of_call
from tightfit.operators.facts import OpInfo, is_suspect, result_tensors, tensors_in, undefined_results
from tightfit.operators.opaque_calls import OpaqueCall, function_of
from tightfit.replay.contents import checksum, same_bits
from tightfit.replay.values import AS_A_WHOLE, TapedOp, TapedRegion
from tightfit.step.snapshot import RandomState


class Repeats:
    """The calls that were repeated, and the kinds that are trusted since; shared by all tapes of an applied plan."""

    def __init__(self) -> None:
        self.trusted: set[Hashable] = set()
        """Kinds of calls; of PyTorch's operators, on a device whose kernels never add atomically, their names."""

    def begin(self, op: TapedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Repeat | None:
        """Prepare to repeat a call that is about to be made; None if it is trusted."""
        info = op.info
        device = device_of_call(tensors_in((*args, *kwargs.values())), kwargs)
        if not (info.needs_self_check or (device.adds_atomically and is_suspect(info, args, kwargs))):
            return None
        kind: Hashable = info.name
        if device.adds_atomically or info.is_foreign:
            kind = kind_of_call(info, args, kwargs, device, function_of(op.func))
        return None if kind in self.trusted else Repeat(self, op, args, kwargs, device, kind)

    def trusts(self, function: Any, info: OpInfo, args: tuple[Any, ...], device: Device) -> bool:
        """Tell whether a call of this kind of an `autograd.Function` was repeated, and agreed."""
        return kind_of_call(info, args, {}, device, function) in self.trusted


class Repeat:
    """One call, to be made again."""

    def __init__(
        self, owner: Repeats, op: TapedOp, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device, kind: Hashable
    ) -> None:
        self._owner = owner
        self._op = op
        self._args = args
        self._kwargs = kwargs
        self._device = device
        self._kind = kind
        self._tensors = tensors_in((*args, *kwargs.values()))
        self.reason = ""
        """Why it may not be replayed."""
        with below_autograd():
            self._before = [checksum(tensor) for tensor in self._tensors]
            self._copies = {id(t): _clone_with_storage(t) for t in self._tensors} if op.info.mutates else {}

    def agrees(self, result: Any) -> bool:
        """Make the call, which has just been made, again; tell whether it may be replayed."""
        try:
            if self.changed_inputs():
                self.reason = CHANGED_INPUTS
            elif not all(self._same_again(result, left) for left in reversed(range(self._device.repetitions))):
                self.reason = self.reason or GAVE_OTHER_BITS
        except RuntimeError as error:
            if is_out_of_memory(error):  # which says nothing about the call
                return False
            self.reason = GAVE_OTHER_BITS
        if not self.reason:
            self._owner.trusted.add(self._kind)
            return True
        bar(self._op.info, self._args, self._kwargs, self._device, function_of(self._op.func), self.reason)
        return False

    def refuse(self, region: TapedRegion, position: int) -> None:
        """Note in a region that its operation at a position, this call, must not be replayed."""
        region.refused.add(position)
        if self.reason == GAVE_OTHER_BITS:  # then so would a second call of the whole module
            region.refused.add(AS_A_WHOLE)

    def changed_inputs(self) -> list[torch.Tensor]:
        """Return the inputs whose contents are not as they were, though the operation does not say that it writes."""
        written = self._written()
        with below_autograd():
            pairs = zip(self._tensors, self._before, strict=True)
            return [t for t, before in pairs if id(t) not in written and checksum(t) != before]

    def _written(self) -> set[int]:
        places = self._op.info.mutates
        return {id(t) for position, name in places for t in _at(self._args, self._kwargs, position, name)}

    def _same_again(self, result: Any, left: int) -> bool:
        """Make the call again, and compare; `left`: how many times more after this one."""
        if self._op.info.is_foreign:
            with _leaving_random_numbers() as moved:
                agrees = self._is_same_again(result, left)
                if moved():
                    self.reason = DREW_UNSEEN
                return agrees and not self.reason
        return self._is_same_again(result, left)

    def _is_same_again(self, result: Any, left: int) -> bool:
        op, written = self._op, self._written()
        with below_autograd(), self._device.busy_beside() if left % 2 else nullcontext():
            copies = {key: _clone_with_storage(copy) for key, copy in self._copies.items()} if left else self._copies
            args = _replace(self._args, copies)
            kwargs = {name: _replace((a,), copies)[0] for name, a in self._kwargs.items()}
            set_grad_mode(op.grad)
            if isinstance(op.func, OpaqueCall):
                again: Any = op.func.watched(*args, **kwargs)
            elif op.generator is not None:
                assert op.random_state is not None
                with drawing_from(op.generator, op.random_state):
                    again = op.func(*args, **kwargs)
            else:
                again = op.func(*args, **kwargs)
            undefined = undefined_results(op.info, self._args, self._kwargs)
            results = zip(result_tensors(result), result_tensors(again), strict=True)
            pairs = [pair for place, pair in enumerate(results) if place not in undefined]
            pairs += [(t, copies[id(t)]) for t in self._tensors if id(t) in written]
            return all(same_bits(a, b) for a, b in pairs) and not self.changed_inputs()


@contextmanager
def _leaving_random_numbers() -> Iterator[Callable[[], bool]]:
    """Put all generators back afterwards; inside, tell whether they have moved."""
    with below_autograd():
        before = RandomState()

    def moved() -> bool:
        with below_autograd():
            return not RandomState().equals(before)

    try:
        yield moved
    finally:
        with below_autograd():
            before.restore()


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> list[torch.Tensor]:
    return tensors_in((args[position] if position < len(args) else kwargs.get(name),))


def _replace(arguments: Any, copies: dict[int, torch.Tensor]) -> Any:
    replaced = [
        copies.get(id(a), a)
        if isinstance(a, torch.Tensor)
        else _replace(a, copies)
        if isinstance(a, list | tuple)
        else a
        for a in arguments
    ]
    return type(arguments)(replaced)


def _clone_with_storage(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    copy.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return copy
