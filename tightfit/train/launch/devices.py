"""The device of a process: its own and no other, chosen before anything is put on one."""

from __future__ import annotations

import torch

from tightfit.device.registry import accelerator_kind, device_for, device_named, preferred_kind
from tightfit.errors import UnsupportedInput
from tightfit.train.device import resolve_device
from tightfit.train.launch.roles import Alone, Member
from tightfit.train.launch.settings import DistributedSettings


def take_device(role: Alone | Member, settings: DistributedSettings, device: str) -> torch.device:
    """Choose the device of this process, and make it the current one.

    Args:
        role: alone, or one of several.
        settings: the flags.
        device: ``--device``.

    Raises:
        UnsupportedInput: there is no such device, or several processes would share it.
    """
    chosen = device_for(_choose(role, settings, device))
    chosen.make_current()
    return chosen.numbered()


def choose_backend(device: torch.device, wanted: str | None) -> str:
    """Choose the backend for collectives between processes whose devices are like this one.

    Raises:
        UnsupportedInput: ``wanted`` does not exist, or not for such devices.
    """
    usable = device_for(device).backends
    backend = wanted or usable[0]
    known = {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "mpi": torch.distributed.is_mpi_available(),
        "ucc": torch.distributed.is_ucc_available(),
    }
    if backend not in known or not known[backend]:
        offered = ", ".join(name for name, is_there in known.items() if is_there)
        raise UnsupportedInput(
            f"--dist-backend {backend} is not offered by this PyTorch, which has: {offered}. "
            f"Leave it out to take {usable[0]}."
        )
    if backend not in usable:
        raise UnsupportedInput(
            f"--dist-backend {backend} cannot connect processes that are on {device}, which {', '.join(usable)} can. "
            f"Leave it out to take {usable[0]}."
        )
    return backend


def _choose(role: Alone | Member, settings: DistributedSettings, device: str) -> torch.device:
    accelerator = accelerator_kind(device)
    if settings.gpu is not None:
        if device not in ("auto", accelerator.kind, f"{accelerator.kind}:{settings.gpu}"):
            raise UnsupportedInput(
                f"both --gpu {settings.gpu} and --device {device} are given, but they are not the same. "
                f"Give one of them."
            )
        if isinstance(role, Member) and role.shares_node and role.local_rank != settings.gpu:
            raise UnsupportedInput(
                f"--gpu {settings.gpu} would put all processes of this node on one GPU; this one's is "
                f"{role.local_rank}. Leave --gpu out: each process takes the GPU of its local rank."
            )
        return resolve_device(f"{accelerator.kind}:{settings.gpu}")
    if isinstance(role, Alone):
        return resolve_device(device)
    named = device_named(preferred_kind().kind if device == "auto" else device)
    if named is not None and named.is_host:
        return named.torch_device
    if device not in ("auto", accelerator.kind, f"{accelerator.kind}:{role.local_rank}") and role.shares_node:
        raise UnsupportedInput(
            f"--device {device} would put all processes of this node on one device. "
            f"Write --device {accelerator.kind}: each process takes the GPU of its local rank."
        )
    if role.local_rank >= accelerator.count():
        raise UnsupportedInput(
            f"local rank {role.local_rank} has no GPU of its own: this node has {accelerator.count()}. "
            f"Start fewer processes on it (--nproc-per-node), or write --device cpu."
        )
    return torch.device(accelerator.kind, role.local_rank)
