"""What decides about a plan, told apart before each step."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.step.key import ModelWatch, StepKey, step_key

x, y = torch.zeros(4, 8), torch.zeros(4, 8)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Holder:
    inputs: torch.Tensor
    scale: float = 1.0


def key_of(batch: Any, model: nn.Module | None = None, *optimizers: torch.optim.Optimizer) -> StepKey:
    return step_key(ModelWatch(model or nn.Linear(8, 8)), batch, optimizers)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (x, torch.ones(4, 8)),
        ((x, y), (y, x)),
        ((x, y), [x, y]),
        ({"pair": (x, y)}, OrderedDict(pair=Pair(x, y))),
        ({"a": x, "weight": 0.5}, {"a": y, "weight": 0.25}),
        (Holder(x, 1.0), Holder(y, 2.0)),
        ({"a": x, "names": ["left", "right"], "ids": [1, 2]}, {"a": x, "names": ["up", "down"], "ids": [3, 4]}),
    ],
    ids=["contents", "tuples", "lists", "subclasses", "floats", "objects", "what belongs to single samples"],
)
def test_equal(one: Any, other: Any) -> None:
    model = nn.Linear(8, 8)
    assert key_of(one, model) == key_of(other, model)
    assert hash(key_of(one, model)) == hash(key_of(other, model))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (x, torch.zeros(4, 9)),
        (x, torch.zeros(8, 4)),
        (x, torch.zeros(4, 8, dtype=torch.float64)),
        (x, torch.zeros(8, 4).t()),
        (x, torch.zeros(8, 8)[:4]),
        (x, torch.zeros(4, 8).requires_grad_()),
        (x, torch.zeros(4, 8).to_sparse()),
        ((x, y), (x, x)),
        ((x,), (x, y)),
        ({"a": x}, {"b": x}),
        ({"a": x, "flag": True}, {"a": x, "flag": False}),
        ({"a": x, "mode": "train"}, {"a": x, "mode": "sample"}),
        ({"a": x, "length": 3}, {"a": x, "length": 4}),
        ({"a": x, "mask": None}, {"a": x, "mask": y}),
        (Holder(x), Holder(torch.zeros(4, 9))),
    ],
)  # fmt: skip
def test_different(one: Any, other: Any) -> None:
    model = nn.Linear(8, 8)
    assert key_of(one, model) != key_of(other, model)


def test_the_model_and_the_settings_count() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters())
    watch = ModelWatch(model)
    keys = [step_key(watch, x, (optimizer,))]

    def changed() -> None:
        now = step_key(watch, x, (optimizer,))
        assert now == step_key(watch, x, (optimizer,)) == key_of(x, model, optimizer)
        assert hash(now) == hash(key_of(x, model, optimizer))
        assert now not in keys
        assert (now.sizes, now.numbers) == (keys[0].sizes, keys[0].numbers)
        keys.append(now)

    model.eval()
    changed()
    model[0].bias.requires_grad_(False)
    changed()
    model.double()
    changed()
    model.append(nn.Linear(8, 2))
    changed()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    changed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed()
    model[1] = nn.Identity()
    changed()
    model[2].bias = None
    changed()
    model[2].weight.data = torch.zeros(3, 8)
    changed()
    model[1].register_parameter("scale", nn.Parameter(torch.ones(8)))
    changed()
    model._modules["last"] = model._modules.pop("2")
    changed()
    del model[0]
    changed()
    model.add_module("0", model[1])  # the same one twice
    changed()


def test_looking_does_not_count_as_handing_out_memory() -> None:
    """The engine takes a tensor whose storage somebody asked for as written."""
    exposed: list[torch.Tensor] = []
    watch = MemoryWatch(exposed.append)
    with watch:
        key_of((x, y.t()))
        assert exposed == []
        x.untyped_storage()
    assert len(exposed) == 1


def test_growth_is_that_of_the_tensor_that_grew_most() -> None:
    small, large = key_of((torch.zeros(4, 8), torch.zeros(4, 1))), key_of((torch.zeros(4, 24), torch.zeros(2, 1)))
    assert large.growth_from(small) == 3
    assert small.growth_from(large) == 2
    assert small.growth_from(small) == 1
    assert (small.elements, large.elements) == (36, 98)
