"""How much of an operation can be run alone in a given amount of memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from tightfit.profiling.cost_cache import Cost
from tightfit.profiling.signatures import Call, TensorSpec

#: The rest is for what a kernel takes inside, which is only known afterwards.
_USABLE = 31 / 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialCall:
    """A call that fits: the whole, one on part of the tensors in its lists, or none."""

    call: Call | None
    scale: float = 1.0
    """Bytes of the whole call's arguments to those of this one."""
    note: str = ""
    """Why the whole call was not run; empty if it is."""

    def scaled(self, cost: Cost) -> Cost:
        """The whole call's cost, from this one's."""
        if not self.note:
            return cost
        return Cost(round(cost.ms * self.scale, 6), int(cost.scratch_bytes * self.scale), ())


def argument_bytes(call: Call) -> int:
    """Memory that made-up arguments take."""
    return _nbytes(call.args) + _nbytes(tuple(value for _, value in call.kwargs))


def fit_call(call: Call, result_bytes: int, room_bytes: int | None) -> PartialCall:
    """As much of `call` as fits into `room_bytes` with its arguments and results."""
    if room_bytes is not None:
        room_bytes = int(room_bytes * _USABLE)
    whole = argument_bytes(call)
    if room_bytes is None or whole + result_bytes <= room_bytes:
        return PartialCall(call=call)
    lists = [argument for argument in call.args if _is_tensor_list(argument)]
    lengths = {len(tensors) for tensors in lists}
    if len(lengths) == 1:
        (length,) = lengths
        fixed = whole - sum(_nbytes(tensors) for tensors in lists)
        per_place = [sum(_nbytes((tensors[place],)) for tensors in lists) for place in range(length)]
        with_results = 1 + result_bytes / max(1, sum(per_place))
        count = sum(fixed + taken * with_results <= room_bytes for taken in accumulate(per_place))
        if count:
            # Lists of scalars beside lists of tensors have one for each.
            part = replace(
                call, args=tuple(a[:count] if isinstance(a, tuple) and len(a) == length else a for a in call.args)
            )
            return PartialCall(
                call=part,
                scale=whole / max(1, argument_bytes(part)),
                note=f"measured on {count} of {length} tensors and scaled: all of them do not fit beside the model",
            )
    return PartialCall(call=None, note="estimated from other operations: alone it does not fit beside the model")


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, tuple) and len(argument) > 1 and all(isinstance(a, TensorSpec) for a in argument)


def _nbytes(arguments: Any) -> int:
    if isinstance(arguments, TensorSpec):
        return arguments.nbytes
    return sum(_nbytes(a) for a in arguments) if isinstance(arguments, tuple) else 0
