"""What FSDP2's collectives take from memory: measured once, and taken by stand-ins where a process is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tightfit.device import memory as meter
from tightfit.distributed.process_group import ProcessGroup

#: Bytes that each process contributes to the exchanges that are measured.
_PROBE_BYTES = 1 << 18

_scratch: dict[tuple[str, int], tuple[float, float]] = {}


def collective_workspace(group: ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Memory that an exchange takes inside, for each byte of the larger of its two tensors: (all-gather,
    reduce-scatter).

    Measured by an exchange on first use, in which all processes of the group have to take part.  On CUDA it is nothing:
    NCCL's buffers are not PyTorch's, and are there all the time.
    """
    if device.type != "cpu" or group.world_size == 1:
        return 0.0, 0.0
    key = group.control.group_name, group.world_size
    if key not in _scratch:
        part = torch.zeros(_PROBE_BYTES // 4)
        whole = torch.zeros(part.numel() * group.world_size)

        # Renamed in PyTorch 2.13.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

        def gather() -> None:
            all_gather(whole, part, group=group.control)

        def scatter() -> None:
            reduce_scatter(part, whole, op=dist.ReduceOp.AVG, group=group.control)

        _scratch[key] = _peak_of(gather) / whole.nbytes, _peak_of(scatter) / whole.nbytes
    return _scratch[key]


def _peak_of(exchange: Callable[[], None]) -> int:
    exchange()  # the first one may set something up
    return meter.measure_peak(exchange, 0)[1]


class CollectiveStandIn:
    """Stands in for FSDP2's collectives where nobody else takes part: takes the memory that a real one takes."""

    def __init__(self, scratch_per_byte: float) -> None:
        """Its scratch stays until the next exchange of its kind, as it may with gloo, which lets go of scratch in a
        thread of its own: often only when the process is at its next operations already.
        """
        self._scratch_per_byte = scratch_per_byte
        self._scratch: torch.Tensor | None = None
        self.largest_bytes = 0
        """The most that one exchange took."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer to send from or receive in."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        """No exchange."""
        self.let_go()
        nbytes = int(self._scratch_per_byte * max(output_tensor.nbytes, input_tensor.nbytes))
        self.largest_bytes = max(self.largest_bytes, nbytes)
        self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=output_tensor.device)

    def let_go(self) -> None:
        """Of scratch that is still there."""
        self._scratch = None
