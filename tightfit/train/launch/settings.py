"""How a run is distributed over processes and nodes: the flags of PyTorch's ImageNet example, with their meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tightfit.errors import UnsupportedInput
from tightfit.train.settings import Settings

Strategy = Literal["auto", "ddp", "fsdp", "none"]


@dataclass(frozen=True, kw_only=True)
class DistributedSettings(Settings):
    """Which processes there are, and which of them this is."""

    TITLE = "distributed"

    multiprocessing_distributed: bool = False
    """Start one process per GPU of this node (or --nproc-per-node); --world-size and --rank then count nodes"""
    nproc_per_node: int | None = None
    """Processes to start on this node (default: one per GPU; 1 without GPUs)"""
    world_size: int = -1
    """Number of processes in all; -1: as set by torchrun or Slurm"""
    rank: int = -1
    """Rank of this process; -1: as set by torchrun or Slurm"""
    local_rank: int | None = None
    """Rank of this process on its node, and the number of its GPU (default: as set by the launcher)"""
    gpu: int | None = None
    """Use this GPU only"""
    dist_url: str = "env://"
    """Rendezvous: env:// (MASTER_ADDR and MASTER_PORT), tcp://HOST:PORT or file:///PATH"""
    dist_backend: str | None = None
    """Backend for all-reduces and all-gathers (default: nccl on GPUs, gloo elsewhere)"""
    dist_timeout: int = 300
    """Seconds to wait for the other processes, at the rendezvous and later"""
    dist_train: bool = False
    """Expect several processes, and note it if there is only one; also MODEL.DIST_TRAIN in YAML"""
    strategy: Strategy = "auto"
    """ddp (auto): every process has the whole model and its share of each batch; fsdp: parameters, gradients and
    optimizer state are sharded, too; none: one process only"""

    ddp_find_unused_parameters: Literal["auto", "on"] = "auto"
    """on: each step may use other parameters; auto: only if data or Python's random numbers decide which"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "nproc_per_node", "dist_timeout")
        self._require(0, "gpu", "local_rank")
        for name, least in (("world_size", 1), ("rank", 0)):
            value = getattr(self, name)
            if value != -1 and value < least:
                raise UnsupportedInput(
                    f"--{name.replace('_', '-')} is {value}, but it must be at least {least}. "
                    f"Give such a number, or leave it out to take the launcher's."
                )
        if not self.dist_url.startswith(("env://", "tcp://", "file://")):
            raise UnsupportedInput(
                f"--dist-url {self.dist_url} is not a rendezvous, so the processes cannot find each other. "
                f"Write env://, tcp://HOST:PORT or file:///PATH."
            )
