"""Find the tensors in a batch, whatever containers hold them."""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private.dispatch import tree_leaves


def batch_tensors(batch: Any) -> list[torch.Tensor]:
    """Return the tensors in a batch of nested containers; an unknown container is searched through its attributes."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, torch.nn.Module | type):
            found += [value for value in vars(leaf).values() if isinstance(value, torch.Tensor)]
    return found


def describe_batch(batch: Any) -> str:
    """Return shapes and dtypes as text, for people and for recognising a batch of the same kind."""
    return ", ".join(
        f"{str(t.dtype).removeprefix('torch.')}[{'x'.join(map(str, t.shape))}]" for t in batch_tensors(batch)
    )
