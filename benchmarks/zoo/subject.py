"""What a row of the zoo trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tightfit
from tightfit.step.model import give_gradients
from tightfit.step.models import Models, as_model

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass
class Subject:
    """A model, or several, with a batch and the kinds of steps that train them."""

    models: Models
    batch: Any
    steps: Mapping[str, tightfit.Step]
    """Each kind of step by its name; a single one has the name ""."""

    @classmethod
    def single(cls, model: nn.Module, batch: Any, loss: Loss | None = None) -> Subject:
        """One model with one kind of step, without an optimizer."""
        return cls(model, batch, {"": tightfit.Step(loss=loss)})

    @property
    def module(self) -> nn.Module:
        """All models in one."""
        return as_model(self.models)

    def beside(self) -> list[torch.Tensor]:
        """Return the tensors that only the losses reach, such as a teacher's."""
        found: list[torch.Tensor] = []
        for step in self.steps.values():
            for thing in step.reached(self.module):
                if isinstance(thing, nn.Module):
                    found += [*thing.parameters(), *thing.buffers()]
                elif isinstance(thing, torch.Tensor):
                    found.append(thing)
        return found

    def start(self) -> None:
        """Make gradients, which are there in every step but the first."""
        give_gradients(self.module)

    def run(self, applied: tightfit.Applied | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Take one step of each kind, under a plan if there is one, and yield its name and its loss, detached."""
        for kind, step in self.steps.items():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            if applied is None:
                loss = step.run_loss(self.module, self.batch)
            else:
                loss = applied.loss(self.models, self.batch, kind=kind or None)
            loss.backward()
            step.run_optimizers(self.module)
            yield kind, loss.detach()

    def measure(self) -> tightfit.Profile | None:
        """Measure its step once for all budgets; None where there are several kinds, which `fit` measures together."""
        if "" not in self.steps:
            return None
        return tightfit.measure(self.models, self.batch, step=self.steps[""])

    def fit(self, budget: int, profile: tightfit.Profile | None) -> tightfit.Applied:
        """Plan its steps for a budget."""
        step = self.steps.get("", self.steps)
        return tightfit.fit(self.models, self.batch, budget=budget, step=step, profile=profile)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that step."""
        return list({id(one): one for step in self.steps.values() for one in step.optimizers}.values())


def mean_square(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return a loss of whatever floating-point results a model has."""
    args, kwargs = (
        ((), batch) if isinstance(batch, Mapping) else (batch, {}) if isinstance(batch, tuple) else ((batch,), {})
    )
    return sum_of_squares(model(*args, **kwargs))


def sum_of_squares(result: Any) -> torch.Tensor:
    """Return the sum of the mean squares of all tensors in a result that depend on a parameter."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(_plain(result)) if isinstance(leaf, torch.Tensor)]
    return torch.stack([leaf.float().pow(2).mean() for leaf in leaves if leaf.requires_grad]).sum()


def _plain(result: Any) -> Any:
    return result.to_tuple() if hasattr(result, "to_tuple") else result
