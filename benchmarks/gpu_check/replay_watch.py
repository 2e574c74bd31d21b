"""Compare what replay rebuilds with what was dropped, bit for bit, by checksums that stay on the GPU.

Where backward does not give the same bits twice, gradients say nothing of replay; what forward makes again must be
equal all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private.dispatch import below_autograd
from tightfit.replay.replayer import Handle, Replayer
from tightfit.replay.tape import Tape


@dataclass
class ReplayWatch:
    """What was dropped and read again."""

    dropped: int = 0
    compared: int = 0
    pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)

    def differing(self) -> list[str]:
        """Return what was rebuilt with other bits: the operation that made it, its position and its size."""
        return [name for name, before, after in self.pairs if not torch.equal(before, after)]


@contextmanager
def watching_replay() -> Iterator[ReplayWatch]:
    """Watch every tape of this process inside the context."""
    watch = ReplayWatch()
    expected: dict[int, torch.Tensor] = {}
    pack, read = Tape.pack, Replayer.read

    def watching_pack(self: Tape, tensor: torch.Tensor) -> Any:
        packed = pack(self, tensor)
        if type(packed) is Handle:
            watch.dropped += 1
            expected[id(packed)] = _sums(tensor)
        return packed

    def watching_read(self: Replayer, handle: Handle) -> torch.Tensor:
        value = handle.ref.value
        name = f"{value.op.info.name} at {value.op.position}" if value.op is not None else "what was made elsewhere"
        was_written = value.live is not None  # then plain reads the new contents, too
        tensor = read(self, handle)
        if not was_written:
            watch.compared += 1
            watch.pairs.append((f"{name}: {tensor.dtype} {list(tensor.shape)}", expected[id(handle)], _sums(tensor)))
        return tensor

    Tape.pack, Replayer.read = watching_pack, watching_read  # type: ignore[method-assign]  # to listen
    try:
        yield watch
    finally:
        Tape.pack, Replayer.read = pack, read  # type: ignore[method-assign]  # to listen


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Return sums over the tensor's bytes, plain and weighted by place, so that a change of order shows."""
    with below_autograd():
        data = tensor.contiguous().view(-1).view(torch.uint8)
        numbers = data.to(torch.int64)
        places = torch.arange(numbers.numel(), device=tensor.device) % 65521
        return torch.stack([numbers.sum(), (numbers * places).sum()])
