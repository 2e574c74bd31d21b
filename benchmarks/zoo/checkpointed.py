"""`torch.utils.checkpoint` on every block of a model whose blocks nobody has named."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def choices_of_blocks(model: nn.Module, most: int = 2) -> list[list[nn.Module]]:
    """Return ways to divide a model into blocks, the coarsest first.

    A block is a module of a class that the model repeats, and that holds other modules.  The coarsest blocks are those
    that lie in no other; where such a block repeats a class itself, the next way has those instead.
    """
    found: list[list[nn.Module]] = []
    blocks = _repeated(model)
    while blocks and len(found) < most:
        found.append(blocks)
        finer = [part for block in blocks for part in _repeated(block) or [block]]
        if [id(one) for one in finer] == [id(one) for one in blocks]:
            break
        blocks = finer
    return found or [[child for child in model.children() if next(child.parameters(), None) is not None]]


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Run the forward of each block under `torch.utils.checkpoint`, as most models' own switch does."""
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules below one whose class is there more than once, and which hold others."""
    counts = Counter(type(part) for part in module.modules())
    return list(_outermost(module, {kind for kind, count in counts.items() if count > 1}))


def _outermost(module: nn.Module, kinds: set[type[nn.Module]]) -> Iterator[nn.Module]:
    for child in module.children():
        holds_others = next(child.children(), None) is not None
        if type(child) in kinds and holds_others and not isinstance(child, _CONTAINERS):
            yield child
        else:
            yield from _outermost(child, kinds)
