"""Route as in forward: tied scores cannot fall out otherwise, as the router's choice is not made again.

See https://github.com/huggingface/transformers/issues/47467 and https://github.com/NVIDIA-NeMo/Automodel/issues/2635.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.promises.training import same_training

STEPS = 100


class TopTwo(nn.Module):
    """A router whose scores are rounded, so that many are tied at every step, and experts that run if chosen."""

    ties = 0

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        exact = self.router(tokens)
        scores = exact + (exact.detach().round() - exact.detach())
        best = scores.detach().sort(dim=-1, descending=True).values
        TopTwo.ties += int((best[:, 1] == best[:, 2]).sum())  # the second place is shared: either may be chosen
        weights, chosen = torch.topk(scores.softmax(-1), 2, dim=-1)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                result = result.index_add(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return x + result.view_as(x)


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(TopTwo() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x - 1).pow(2).mean()


@pytest.mark.exhaustive  # the one below has ties in every layer
def test_a_router_with_ties_at_every_step() -> None:
    batches = [torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
    TopTwo.ties = 0
    trained = same_training(HandWritten, batches)
    assert TopTwo.ties > 2 * STEPS, "the scores were hardly ever tied"
    assert all(torch.isfinite(step["loss"]) for step in trained.steps)


def tiny_mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        output_router_logits=True,
    )
    model: nn.Module = transformers.MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):  # all experts score the same for every token, and stay so
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


@pytest.mark.slow
@pytest.mark.exhaustive
def test_mixtral_whose_experts_are_all_tied() -> None:
    batches: list[Any] = []
    for step in range(STEPS // 3):
        tokens = torch.arange(step, step + 16).view(2, 8) % 32
        batches.append({"input_ids": tokens, "labels": tokens})
    trained = same_training(tiny_mixtral, batches)
    assert all(torch.isfinite(step["loss"]) for step in trained.steps)
    assert trained.steps[-1]["loss"] < trained.steps[0]["loss"]
