"""The workspace of FSDP2's collectives: measured once, then allocated by stand-ins that need no other rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tightfit.device import device_for
from tightfit.device import memory as meter
from tightfit.distributed.process_group import ProcessGroup

#: Bytes of each rank's shard in the collectives that are measured.
_PROBE_BYTES = 1 << 18

_workspace_ratios: dict[tuple[str, int], tuple[float, float]] = {}


def collective_workspace(group: ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Measure the workspace of an all-gather and of a reduce-scatter, in bytes per byte of the unsharded tensor.

    The first call for a group runs both collectives, so all its ranks have to make it.  On a GPU both are 0: NCCL's
    buffers are allocated outside PyTorch and stay for the whole run.
    """
    if not device_for(device).is_host or group.world_size == 1:
        return 0.0, 0.0
    key = group.control.group_name, group.world_size
    if key not in _workspace_ratios:
        shard = torch.zeros(_PROBE_BYTES // 4)
        unsharded = torch.zeros(shard.numel() * group.world_size)

        # Renamed in PyTorch 2.13.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

        def gather() -> None:
            all_gather(unsharded, shard, group=group.control)

        def scatter() -> None:
            reduce_scatter(shard, unsharded, op=dist.ReduceOp.AVG, group=group.control)

        _workspace_ratios[key] = _peak_of(gather) / unsharded.nbytes, _peak_of(scatter) / unsharded.nbytes
    return _workspace_ratios[key]


def _peak_of(collective: Callable[[], None]) -> int:
    collective()  # the first call may allocate what later ones reuse
    return meter.measure_peak(collective, 0)[1]


class CollectiveStandIn:
    """Replaces one of FSDP2's collectives: allocates its workspace, moves no data.

    The workspace stays until the next call.  Gloo frees it in a thread of its own, which often comes to that only when
    the process is at its next ops already.
    """

    def __init__(self, workspace_ratio: float) -> None:
        """Take the workspace in bytes per byte of the larger tensor, see `collective_workspace`."""
        self._workspace_ratio = workspace_ratio
        self._workspace: torch.Tensor | None = None
        self.largest_bytes = 0
        """The largest workspace of a call so far."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate the collective's input or output, as FSDP2's protocol asks."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        """Allocate the workspace of this call and release that of the last one."""
        self.release()
        nbytes = int(self._workspace_ratio * max(output_tensor.nbytes, input_tensor.nbytes))
        self.largest_bytes = max(self.largest_bytes, nbytes)
        self._workspace = torch.empty(nbytes, dtype=torch.uint8, device=output_tensor.device)

    def release(self) -> None:
        """Free the workspace of the last call."""
        self._workspace = None
