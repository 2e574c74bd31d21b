"""Give plain gradients for keyword arguments x dictionaries x dataclasses x in-place writes x views.

See https://github.com/deepspeedai/DeepSpeed/issues/953.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.promises.training import same_training

BATCHES = [torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@dataclass
class Result:
    hidden: Tensor
    extra: dict[str, Any]


class Block(nn.Module):
    """Takes tensors in every way and returns them in every way, as the switches say."""

    def __init__(self, given: str, returned: str, written: bool, viewed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)
        self.back = nn.Linear(16, 16)
        self.given, self.returned, self.written, self.viewed = given, returned, written, viewed

    def forward(
        self, x: Any = None, *rest: Any, scale: Tensor | None = None, options: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(x, Result):
            x, scale = x.hidden, x.extra["scale"]
        elif isinstance(x, dict):
            x, scale = x["x"], x["nested"]["scale"][0]
        elif options is not None:
            x = options["x"]
        elif rest:
            (scale,) = rest
        assert isinstance(x, Tensor)
        assert isinstance(scale, Tensor)
        hidden = torch.tanh(self.linear(x)) * scale
        if self.written:
            hidden.mul_(2).add_(1)
            hidden[:, :2] = hidden[:, :2].clone().sin() + x[:, :2, :1]
        if self.written and self.viewed:
            hidden[..., :16].mul_(0.5)  # writes `hidden` through a view of it
        a, b = hidden.split(16, -1) if self.viewed else (hidden[..., :16].clone(), hidden[..., 16:].clone())
        y = x + self.back(torch.sigmoid(a) * b.exp())
        if self.viewed:
            y = y.transpose(0, 1).unflatten(-1, (4, 4)).flatten(-2).transpose(0, 1)
        scale = scale + y.mean()
        if self.returned == "tuple":
            return y, scale
        if self.returned == "dict":
            return {"y": y, "nested": [{"scale": scale}, None, 3]}
        return Result(y, {"scale": scale})


GIVEN = ("positions", "keywords", "dict", "dataclass")
RETURNED = ("tuple", "dict", "dataclass")


class Net(nn.Module):
    """Half of the ways in and out, a block for each; the models with and without views have the others' half."""

    def __init__(self, written: bool, viewed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(()))
        ways = list(itertools.product(GIVEN, RETURNED))[viewed ^ written :: 2]
        self.blocks = nn.ModuleList(Block(given, returned, written, viewed) for given, returned in ways)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale * 1
        for block in self.blocks:
            x, scale = self.call(block, x, scale)
        return x.pow(2).mean() * scale

    @staticmethod
    def call(block: Block, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if block.given == "positions":
            result = block(x, scale)
        elif block.given == "keywords":
            result = block(scale=scale, options={"x": x, "unused": [None, "text"]})
        elif block.given == "dict":
            result = block({"x": x, "nested": {"scale": [scale]}})
        else:
            result = block(Result(x, {"scale": scale}))
        if isinstance(result, dict):
            return result["y"], result["nested"][0]["scale"]
        if isinstance(result, Result):
            return result.hidden, result.extra["scale"]
        return result


@pytest.mark.parametrize("written", [False, True], ids=["pure", "in-place"])
@pytest.mark.parametrize("viewed", [False, True], ids=["copies", "views"])
def test_gradients_equal(written: bool, viewed: bool) -> None:
    trained = same_training(lambda: Net(written, viewed), BATCHES)
    assert trained.mismatches == 0
    recomputed = {region.key for region in trained.plan.regions if region.recipe >= 0}
    assert {f"blocks.{n}#0" for n in range(6)} <= recomputed, "a block was kept whole"
    assert trained.dropped_bytes > 0


class Scaled(torch.autograd.Function):
    """A raw kernel that draws from NumPy's generator: made again, it would give other bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = torch.empty_like(x)
        ctx.factor = 1 + np.random.rand()
        result.detach().numpy()[...] = x.detach().numpy() * ctx.factor
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.factor


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Scaled.apply(torch.tanh(self.first(x))).sin()).pow(2).mean()


def test_what_cannot_be_proven_is_kept_with_its_reason() -> None:
    trained = same_training(Raw, BATCHES)
    assert trained.kept_reasons(), "the raw kernel's memory was taken for replayable"
    recipes = [r for r in trained.plan.recipes if r.kept_for_safety]
    assert recipes
    for recipe in recipes:
        for kept in recipe.kept_for_safety:
            assert kept.op
            assert kept.reason
            assert kept.nbytes > 0
