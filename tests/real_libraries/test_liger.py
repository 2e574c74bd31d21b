"""Losses of liger-kernel that run on any device: functions that compute their gradients in forward, by `torch.func`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.real_libraries.models import WIDTH, Block
from tests.real_libraries.trainings import five_steps


def test_a_preference_loss_in_chunks() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    class Preferring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 64, bias=False)
            self.blocks = nn.Sequential(*[Block() for _ in range(3)])
            self.loss = LigerFusedLinearORPOLoss(compiled=False)

        def forward(self, ids: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.head.weight, self.blocks(self.embedding(ids)), ids)[0]
            return loss

    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return Preferring(), torch.randint(0, 64, (4, 32))

    peaks = five_steps(make, lambda model, ids: model(ids), lambda model: model.blocks)  # type: ignore[no-any-return]  # calls of modules are not annotated
    assert peaks.replayed_ops > 0
    assert peaks.smallest < peaks.checkpointed < peaks.plain
