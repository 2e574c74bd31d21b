"""Shrink an op's call until it can be run alone in a given amount of memory, or in what there turns out to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tightfit.profiling.cost_cache import Cost
from tightfit.profiling.signatures import Call, TensorSpec

#: The rest is for the kernel's workspace, which is known only afterwards.
_USABLE = 31 / 32
_ESTIMATED = "estimated from other operations: alone it does not fit beside the model"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialCall:
    """A call that fits: the full call, one on the largest tensors of its lists that do, or none."""

    call: Call | None
    scale: float = 1.0
    """Bytes of the full call's arguments divided by those of this one."""
    workspace_scale: float = 1.0
    """The same of the largest tensors alone: an op takes the tensors of its lists one after another."""
    note: str = ""
    """Why the full call was not run; empty if it is."""

    def scaled(self, cost: Cost) -> Cost:
        """Scale this call's cost to that of the full call."""
        if not self.note:
            return cost
        ms, device_ms = round(cost.ms * self.scale, 6), round(cost.device_ms * self.scale, 6)
        return Cost(ms, int(cost.workspace_bytes * self.workspace_scale), (), device_ms)

    def given_up(self) -> PartialCall:
        """Return what stands for this call when it could not be run: of a part, that the figures are estimates."""
        return PartialCall(call=None, note=_ESTIMATED) if self.note else self


def argument_bytes(call: Call) -> int:
    """Return the memory that made-up arguments of the call take."""
    return _nbytes(call.args) + _nbytes(tuple(value for _, value in call.kwargs))


def fit_call(call: Call, result_bytes: int, room_bytes: int | None) -> PartialCall:
    """Find the largest part of a call that fits into `room_bytes` with its arguments and results.

    Args:
        call: the full call. It is split only where its lists of tensors (foreach ops) have the same length.
        result_bytes: memory that its results take.
        room_bytes: memory that running it may take; None: as much as it needs.
    """
    if room_bytes is not None:
        room_bytes = int(room_bytes * _USABLE)
    full_bytes = argument_bytes(call)
    if room_bytes is None or full_bytes + result_bytes <= room_bytes:
        return PartialCall(call=call)
    lists = [argument for argument in call.args if _is_tensor_list(argument)]
    lengths = {len(tensors) for tensors in lists}
    if len(lengths) == 1:
        (length,) = lengths
        fixed_bytes = full_bytes - sum(_nbytes(tensors) for tensors in lists)
        bytes_of = [sum(_nbytes((tensors[index],)) for tensors in lists) for index in range(length)]
        with_results = 1 + result_bytes / max(1, sum(bytes_of))
        chosen: set[int] = set()
        taken_bytes = float(fixed_bytes)
        for index in sorted(range(length), key=lambda index: -bytes_of[index]):  # the largest say the most
            if taken_bytes + bytes_of[index] * with_results <= room_bytes:
                chosen.add(index)
                taken_bytes += bytes_of[index] * with_results
        if chosen:
            # Lists of scalars beside lists of tensors have one for each.
            part = replace(
                call,
                args=tuple(
                    tuple(entry for index, entry in enumerate(a) if index in chosen)
                    if isinstance(a, tuple) and len(a) == length
                    else a
                    for a in call.args
                ),
            )
            return PartialCall(
                call=part,
                scale=full_bytes / max(1, argument_bytes(part)),
                workspace_scale=max(bytes_of) / max(1, *(bytes_of[index] for index in chosen)),
                note=f"measured on {len(chosen)} of {length} tensors and scaled: all of them do not fit beside the "
                f"model",
            )
    return PartialCall(call=None, note=_ESTIMATED)


def half_of(part: PartialCall) -> PartialCall:
    """Return the call on half of the batch, the first dimension of its first tensor: for what was still too large."""
    first = None if part.call is None else next((a for a in part.call.args if isinstance(a, TensorSpec)), None)
    length = first.size[0] if first is not None and first.size else 1
    if part.call is None or length < 2:
        return PartialCall(call=None, note=_ESTIMATED)
    kept = length // 2
    return PartialCall(
        call=replace(part.call, args=tuple(_shortened(argument, length, kept) for argument in part.call.args)),
        scale=part.scale * length / kept,
        workspace_scale=part.workspace_scale * length / kept,
        note="measured on a part of the batch and scaled: all of it does not fit beside the model",
    )


def _shortened(argument: Any, length: int, kept: int) -> Any:
    """Return a tensor whose first dimension is so long with as much of it as is kept; anything else as it is."""
    if not isinstance(argument, TensorSpec) or argument.size[:1] != (length,):
        return argument
    size = (kept, *argument.size[1:])
    reach = argument.offset + 1 + sum((n - 1) * step for n, step in zip(size, argument.stride, strict=True))
    return replace(argument, size=size, nbytes=reach * argument.dtype.itemsize)


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, tuple) and len(argument) > 1 and all(isinstance(a, TensorSpec) for a in argument)


def _nbytes(arguments: Any) -> int:
    if isinstance(arguments, TensorSpec):
        return arguments.nbytes
    return sum(_nbytes(a) for a in arguments) if isinstance(arguments, tuple) else 0
