"""Which of PyTorch's own means a step uses already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tightfit._torch_private.modules import is_compiled
from tightfit.records import Profile


def knobs_of(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    profile: Profile | None,
    *,
    autocast: torch.dtype | None,
    accumulation_steps: int,
    clip_norm: float | None = None,
    around: Sequence[torch.nn.Module] = (),
) -> dict[str, str]:
    """Return what the step uses, by name; what it does not use is told, too, as ``off``.

    `around`: what the model is wrapped in, such as `DistributedDataParallel`.
    """
    modules = [*around, *model.modules()]
    floating = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in floating})
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    checkpoints = () if profile is None else tuple(profile.checkpoints)
    parallel = sorted({type(m).__name__ for m in modules} & {"DistributedDataParallel", "DataParallel"})
    if any(type(m).__name__.startswith("FSDP") for m in modules):
        parallel.append("FSDP")
    return {
        "parameters": ", ".join(dtypes) + (f", {frozen / whole:.0%} frozen" if frozen else ""),
        "autocast": "off" if autocast is None else str(autocast).removeprefix("torch."),
        "gradient checkpointing": f"on, in {len(checkpoints)} places" if checkpoints else "off",
        "accumulation": f"{accumulation_steps} microbatches" if accumulation_steps > 1 else "off",
        "clipping": "off" if clip_norm is None else f"norm {clip_norm:g}",
        "compile": "on" if any(is_compiled(m) for m in modules) else "off",
        "parallel": ", ".join(parallel) or "off",
        "optimizer": ", ".join(map(_optimizer, optimizers)) or "none",
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    groups = optimizer.param_groups
    how = "fused" if any(group.get("fused") for group in groups) else ""
    how = how or ("one by one" if all(group.get("foreach") is False for group in groups) else "")
    return type(optimizer).__name__ + (f" ({how})" if how else "")
