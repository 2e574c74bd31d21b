"""Several models that one step trains: one module to the engine, which never gets to the user.

The paths of modules begin with the key that a model was given under, or with its number.  The loss is called with the
container that was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tightfit.distributed._fsdp_private import unsharded_class
from tightfit.distributed.ddp import unwrapped
from tightfit.errors import UnsupportedInput

#: What `fit` and its parts take as a model: one, or a list, a tuple or a mapping of them.
Models = torch.nn.Module | Sequence[torch.nn.Module] | Mapping[Any, torch.nn.Module]


class ModelSet(torch.nn.Module):
    """Hold the models of one step.

    A copy holds the copies in a copy of the container.
    """

    def __init__(self, given: Sequence[torch.nn.Module] | Mapping[Any, torch.nn.Module]) -> None:
        super().__init__()
        self.given = given
        """The container as it was given."""
        for key, model in _entries(given):
            self.add_module(self._free_name(str(key)), model)

    def _free_name(self, key: str) -> str:
        name = key.replace(".", "_")
        while not name or hasattr(self, name):
            name += "_"
        return name


def as_model(models: Models) -> torch.nn.Module:
    """Return a model as it is, without DistributedDataParallel around it, and several ones as one module.

    Raises:
        UnsupportedInput: there is none, something is no module, or one is there twice.
    """
    if isinstance(models, torch.nn.Module):
        return unwrapped(models)
    if not _is_container(models):
        return models  # type: ignore[return-value]  # what is neither, `check_model` tells
    what = type(models).__name__
    entries = list(_entries(models))
    if not entries:
        raise UnsupportedInput(
            f"an empty {what} was given as the models. There is nothing to train. Give one model, or a list or mapping "
            "of all that the step uses."
        )
    places: dict[int, Any] = {}
    for key, model in entries:
        if not isinstance(model, torch.nn.Module):
            raise UnsupportedInput(
                f"the {what} of models holds a {type(model).__name__} under {key!r}, which is not a torch.nn.Module. "
                "Regions are calls of modules, and what else a step needs belongs to its batch or its loss function. "
                "Give modules only."
            )
        if id(model) in places:
            raise UnsupportedInput(
                f"the {what} of models holds the same {type(model).__name__} under {places[id(model)]!r} and {key!r}. "
                "Its memory would be counted under one of the names only, and plans would be read wrongly. Give each "
                "model once; the loss may call it as often as it likes."
            )
        places[id(model)] = key
    return ModelSet(models)


def given_as(model: Any) -> Any:
    """Return what a loss function is to be called with: the container for several models, else the model."""
    return model.given if isinstance(model, ModelSet) else model


def first_of(models: Any) -> Any:
    """Return a model of a container, or the model itself."""
    if isinstance(models, ModelSet) or not _is_container(models):
        return models
    return next((model for _, model in _entries(models)), models)


def name_of(model: torch.nn.Module) -> str:
    """Name a model by its class, and several ones by their keys and classes."""
    if not isinstance(model, ModelSet):
        return unsharded_class(model).__name__
    return ", ".join(f"{name}: {unsharded_class(one).__name__}" for name, one in model.named_children())


def is_training(model: torch.nn.Module) -> bool:
    """Tell whether a model is in training mode, or any of several."""
    return any(one.training for one in model.children()) if isinstance(model, ModelSet) else model.training


def paths_of_models(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the paths of the models of a step that has several; none for a single one."""
    return tuple(name for name, _ in model.named_children()) if isinstance(model, ModelSet) else ()


def _is_container(models: Any) -> bool:
    return isinstance(models, Mapping | list | tuple)


def _entries(given: Any) -> Iterator[tuple[Any, Any]]:
    yield from given.items() if isinstance(given, Mapping) else enumerate(given)
