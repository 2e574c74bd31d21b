"""Where an allocator caches, its cache is given back when gradients that were freed are kept from now on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightfit.installation import cache_room
from tightfit.installation.resolved_plan import ResolvedPlan


class Caching:
    """A device whose allocator caches; counts how often that is given back."""

    caches_memory = True

    def __init__(self) -> None:
        self.given_back = 0

    def is_capturing(self) -> bool:
        return False

    def give_back(self) -> None:
        self.given_back += 1


@pytest.mark.parametrize(
    ("begins", "times"),
    [
        ("-GGGG", 0),  # kept from the first step on
        ("------", 0),  # freed after each step
        ("-G-G-G", 0),  # two passes for a step
        ("---GGG", 1),
        ("--G--G--G--G", 1),  # several kinds of steps in turn
        ("--G" + 5 * "-" + "G", 2),
    ],
)
def test_the_cache_is_given_back_where_gradients_begin_to_stay(
    begins: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, model = Caching(), nn.Linear(2, 2)
    monkeypatch.setattr(cache_room, "device_for", lambda _: device)
    room = cache_room.CacheRoom(model, 1, ResolvedPlan.dropping_nothing())
    for begin in begins:
        model.weight.grad = torch.zeros(2, 2) if begin == "G" else None
        room.begin_step()
    assert device.given_back == times
