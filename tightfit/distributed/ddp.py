"""Models that DistributedDataParallel wraps, whose reducers see every backward, tightfit's own among them.

A reducer averages gradients only after a forward of its wrapper, so that the backwards of planning are let pass.  Two
kinds take note of them all the same: of a static graph the first backward shows how often each parameter is used, and
one that looks for unused parameters notes which were used since it last averaged.  Both are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tightfit.collector import all_objects
from tightfit.distributed._ddp_private import forget_used_parameters, is_learning_its_graph, renew_reducer
from tightfit.errors import UnsupportedInput


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return what a DistributedDataParallel wraps, which is what can be planned; any other model as it is."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


@contextmanager
def unseen_by_reducers(model: torch.nn.Module) -> Iterator[None]:
    """Open a context in which backwards run that are nobody's training, so that no reducer may remember them.

    Raises:
        UnsupportedInput: of a reducer that would, the state cannot be put back.
    """
    learning: list[DistributedDataParallel] = []
    looking: list[DistributedDataParallel] = []
    for wrapper in _wrappers_around(model):
        if is_learning_its_graph(wrapper):
            if wrapper.mixed_precision is not None:
                raise UnsupportedInput(
                    "the model is wrapped in a DistributedDataParallel with static_graph=True and mixed_precision, "
                    "which takes the first backward that it sees for the training's, and cannot be made to forget "
                    "those of planning. Call fit before the model is wrapped."
                )
            learning.append(wrapper)
        elif wrapper.find_unused_parameters and all(parameter.grad is None for parameter in wrapper.parameters()):
            looking.append(wrapper)
    try:
        yield
    finally:
        for wrapper in learning:
            renew_reducer(wrapper)
        for wrapper in looking:
            forget_used_parameters(wrapper)


def _wrappers_around(model: torch.nn.Module) -> list[DistributedDataParallel]:
    """Return the wrappers that train parameters of the model; it does not know them, so all objects are looked at."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    parameters = {id(parameter) for parameter in model.parameters()}
    wrappers = [thing for thing in all_objects() if issubclass(type(thing), DistributedDataParallel)]
    return [
        wrapper
        for wrapper in wrappers
        if "reducer" in vars(wrapper) and any(id(parameter) in parameters for parameter in wrapper.parameters())
    ]
