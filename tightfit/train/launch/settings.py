"""How a run is spread over processes and machines: the flags of PyTorch's ImageNet example, and what they mean here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tightfit.errors import UnsupportedInput
from tightfit.train.settings import Settings

Strategy = Literal["auto", "ddp", "fsdp", "none"]


@dataclass(frozen=True, kw_only=True)
class DistributedSettings(Settings):
    """Which processes there are, and which of them this is."""

    TITLE = "several processes"

    multiprocessing_distributed: bool = False
    """Start one process for each GPU of this machine (or --nproc-per-node); WORLD_SIZE then counts machines"""
    nproc_per_node: int | None = None
    """Processes to start on this machine (default: the GPUs; 1 without any)"""
    world_size: int = -1
    """Processes in all; -1: what torchrun or Slurm has set"""
    rank: int = -1
    """Number of this process (of this machine, with --multiprocessing-distributed); -1: as for the world size"""
    local_rank: int | None = None
    """Number of this process on its machine, which is the number of its GPU (default: what the launcher has set)"""
    gpu: int | None = None
    """Use this GPU and no other"""
    dist_url: str = "env://"
    """Where the processes meet: env:// (MASTER_ADDR and MASTER_PORT), tcp://HOST:PORT or file:///PATH"""
    dist_backend: str | None = None
    """What carries tensors between them (default: nccl on GPUs, gloo elsewhere)"""
    dist_timeout: int = 300
    """Seconds to wait for the other processes, at the start and later"""
    dist_train: bool = False
    """The run is meant to have several processes: say so if it has only one; also MODEL.DIST_TRAIN in YAML"""
    strategy: Strategy = "auto"
    """ddp (auto): every process has the whole model and a part of each batch; fsdp: and a part of the parameters,
    gradients and optimizer state only; none: one process only"""

    ddp_find_unused_parameters: Literal["auto", "on"] = "auto"
    """on: each step may use other parameters; auto: only if data or Python's random numbers decide about them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "nproc_per_node", "dist_timeout")
        self._require(0, "gpu", "local_rank")
        for name, least in (("world_size", 1), ("rank", 0)):
            value = getattr(self, name)
            if value != -1 and value < least:
                raise UnsupportedInput(
                    f"{name.replace('_', ' ')} is {value}, but it counts from {least}. "
                    f"Give --{name.replace('_', '-')} such a number, or leave it out to take the launcher's."
                )
        if not self.dist_url.startswith(("env://", "tcp://", "file://")):
            raise UnsupportedInput(
                f"--dist-url {self.dist_url} is no place where processes can meet. "
                f"Write env://, tcp://HOST:PORT or file:///PATH."
            )
