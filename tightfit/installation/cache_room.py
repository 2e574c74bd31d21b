"""Keep steps on batches of several sizes within the budget where the allocator caches what is freed."""

from __future__ import annotations

import torch

from tightfit.device import device_for
from tightfit.installation.resolved_plan import ResolvedPlan


class CacheRoom:
    """Give the allocator's cache back where what other steps left in it could keep a plan from its budget."""

    def __init__(self, model: torch.nn.Module, budget_bytes: int, first: ResolvedPlan) -> None:
        """`first`: whose steps find an empty cache."""
        self._model = model
        self._budget_bytes = budget_bytes
        self._began: ResolvedPlan | None = first
        self._held_bytes = 0  # when the plan last changed
        self._steps_without = 0  # that began without gradients, one after another
        self._most_without = 1  # of those, until now, that were no reason to give the cache back

    def give_back(self) -> None:
        """Give the cache back; the next step finds it empty."""
        device_for(self._model).give_back()
        self._began, self._held_bytes = None, 0

    def begin_step(self) -> None:
        """Give the cache back where a training that freed its gradients keeps them from now on.

        A plan's peak is predicted for either. Where gradients came and went, those that stay lie in the way of what was
        cached, so that one after the other takes more than both do alone.

        The first parameter that is trained stands for all.  Where several kinds of steps look like that again and
        again, it is done ever more seldom, as it costs time.
        """
        device = device_for(self._model)
        if not device.caches_memory or device.is_capturing():
            return
        trained = next((parameter for parameter in self._model.parameters() if parameter.requires_grad), None)
        if trained is None or trained.grad is None:
            self._steps_without += 1
            return
        # The gradients of a training's first step are kept, or are those of an earlier pass of the same step.
        if self._steps_without > self._most_without:
            self._most_without = 2 * self._steps_without
            self.give_back()
        self._steps_without = 0

    def make_for(self, resolved: ResolvedPlan, last: ResolvedPlan) -> None:
        """Make room for the steps of a plan behind those of the last one.

        What is cached for batches of other sizes may serve this one not at all.  Only a plan that shares the cache
        finds it as it is, behind larger ones.
        """
        device = device_for(self._model)
        if not device.caches_memory or device.is_capturing():
            return
        held_bytes, plan = device.held_bytes(), resolved.plan
        if held_bytes < self._held_bytes:  # somebody else gave it back
            self._began = last
        self._held_bytes = held_bytes
        self._began = self._began or resolved
        if held_bytes > self._budget_bytes:  # the last plan's steps take more than was predicted
            last.may_find_bytes = 0
        elif held_bytes <= resolved.may_find_bytes and resolved.needs_no_more_than(self._began):
            return
        # A step without a plan is one that the budget is ample for.
        needed_bytes = plan.predicted_peak_bytes - plan.baseline_bytes if plan is not None else self._budget_bytes // 2
        if held_bytes + needed_bytes > self._budget_bytes:
            self.give_back()
            self._began = resolved
