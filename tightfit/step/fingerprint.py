"""Tell one model from another, so that a plan is never installed on the wrong one."""

from __future__ import annotations

import hashlib

import torch

from tightfit.step.models import name_of


def fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of the names, shapes and dtypes of parameters and buffers, and of which parameters train."""
    lines = [name_of(model)]
    lines += [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()]
    lines += [f"{n} {tuple(b.shape)} {b.dtype}" for n, b in model.named_buffers()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
