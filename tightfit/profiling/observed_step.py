"""Observe one step and price its operations: without data where that is possible, else by a real step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from tightfit._torch_private.modules import is_compiled
from tightfit.device import device_for
from tightfit.distributed.fsdp import is_sharded
from tightfit.errors import UnsupportedInput
from tightfit.profiling.cost_cache import CostCache, NoCache
from tightfit.profiling.costs import Costs, measure_costs
from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
from tightfit.profiling.forward_check import asks_for_fakes, forward_differs
from tightfit.profiling.observed_run import Needs, observe_concrete, observe_fake
from tightfit.profiling.observer import Observer
from tightfit.profiling.output_strides import Layouts, corrections
from tightfit.profiling.signatures import SignatureTable
from tightfit.step.model import device_of
from tightfit.step.resident import bytes_held
from tightfit.step.step import Step

_log = logging.getLogger(__name__)

#: The first run finds which results lie in memory otherwise than a fake kernel says, the second one uses that; a third
#: is for operations that only the second one ran, and one more for results that are elsewhere than a fake kernel says.
_MOST_FAKE_RUNS = 5


class Clock:
    """What measuring itself takes, by part."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts_ms = dict.fromkeys(("observing", "workspace", "times", "mechanism"), 0.0)

    def add(self, part: str, ms: float) -> None:
        """Count time that was spent on a part."""
        self._parts_ms[part] += ms

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time spent inside for a part."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - begin) * 1e3)

    def measuring_ms(self) -> Mapping[str, float]:
        """Return the parts so far; what belongs to none of them is "tables"."""
        rest_ms = (time.perf_counter() - self._began) * 1e3 - sum(self._parts_ms.values())
        parts_ms = {**self._parts_ms, "tables": max(0.0, rest_ms)}
        return {part: round(ms, 3) for part, ms in parts_ms.items()}


class Pricer:
    """Price the operations of steps, within the memory that the budget leaves beside the model."""

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Any,
        step: Step,
        clock: Clock,
        *,
        cost_cache: bool,
        timed: bool,
        budget_bytes: int | None,
    ) -> None:
        self.clock = clock
        self.device = device_of(model)
        self.timed = timed
        self.cache = CostCache(self.device) if cost_cache and timed else NoCache()
        self._within: Callable[[], AbstractContextManager[object]] = nullcontext
        self._room_bytes: int | None = None
        if budget_bytes is not None:
            where = device_for(self.device)
            where.give_back()
            # The operations run one after another, and what one leaves in the cache may serve the next one not at all.
            self._within = lambda: where.capped(budget_bytes)
            reached = step.reached(model)
            there_bytes = max(bytes_held(model, batch, step.all_optimizers, reached), where.held_bytes())
            self._room_bytes = budget_bytes - there_bytes

    def price(self, table: SignatureTable, fake_layouts: Mapping[str, Layouts] | None = None) -> Costs:
        """Return what each operation of a run costs.

        `fake_layouts`: of a run without data, how results lay in memory, by the key of the signature.
        """
        known = fake_layouts or {}
        with self._within():
            costs = measure_costs(
                table.calls,
                self.device,
                self.cache,
                timed=self.timed,
                room_bytes=self._room_bytes,
                result_bytes=table.result_bytes,
                fake_layouts={index: known[key] for index, key in enumerate(table.keys) if key in known},
                measured=table.measured,
            )
        self.clock.add("workspace", costs.workspace_ms)
        self.clock.add("times", costs.times_ms)
        return costs


@dataclass(frozen=True, kw_only=True)
class ObservedStep:
    """One step as it was observed, with what its operations cost."""

    observer: Observer
    costs: Costs
    method: str
    """As `Profile.method`."""
    data_dependent: bool
    """Shapes depend on the data."""


def observe_step(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    pricer: Pricer,
    *,
    concrete: bool,
    left_checkpoints: Mapping[str, str] | None = MappingProxyType({}),
) -> ObservedStep:
    """Observe a step without data, or, where that fails or `concrete` asks for it, with data.

    `left_checkpoints` as for `Observer`.

    Raises:
        UnsupportedInput: the step can only be observed with data, and the model is sharded.
    """
    # A compiled module runs eagerly where its copy is called, and without data its own code could not run.
    concrete = concrete or any(is_compiled(module) for module in model.modules())
    found: tuple[Observer, Costs] | Needs = Needs.OTHERS
    # Code that asks whether a tensor is fake goes other ways with one; what is asked of the batch's numbers may change
    # with the next batch.
    asks = asks_for_fakes(model)
    for knows_batch in () if concrete else (True, False) if asks else (False, True):
        if knows_batch and not asks and found is not Needs.SHAPES:
            break
        without_numbers, found = found, _observe_fake(model, batch, step, pricer, left_checkpoints, knows_batch)
        if isinstance(found, Needs):
            continue
        observer, costs = found
        with pricer.clock.part("observing"):
            # A real forward of a sharded model needs all its processes; whether this one is right, the trial run tells.
            differs = not is_sharded(model) and forward_differs(
                observer.observation, observer.checkpoints.decisions, model, batch, step
            )
        if not differs:
            is_dependent = without_numbers is Needs.SHAPES and knows_batch
            return ObservedStep(observer=observer, costs=costs, method="fake", data_dependent=is_dependent)
        _log.info("a real forward runs other operations than the fake one")
    if is_sharded(model):
        raise UnsupportedInput(
            "the model's shapes cannot be told without running it (they depend on the data, or a part of it cannot run "
            "without data), and a model that is sharded by fully_shard cannot be measured by running it yet. Use "
            "DistributedDataParallel for it, or train it without a budget."
        )
    has_compiled = False
    with pricer.clock.part("observing"):
        while True:
            signatures = SignatureTable()
            observer = observe_concrete(
                model, batch, step, signatures, left_checkpoints, runs_native_code=found is Needs.ADDRESSES
            )
            # The first call of a compiled callable compiles it, and runs otherwise than all later ones.
            compiled_now = observer.saw_compiled_calls and not has_compiled
            if observer.checkpoints.is_consistent and not compiled_now:
                break
            has_compiled |= observer.saw_compiled_calls
            left_checkpoints = observer.checkpoints.left
    costs = pricer.price(signatures)
    return ObservedStep(observer=observer, costs=costs, method="real", data_dependent=found is Needs.SHAPES)


#: How real kernels lay their results out where fake ones are wrong, by the signature's key, as measured so far in this
#: process. A first guess: it is held against what the kernels do now, as the fake ones' word is.
_corrected: dict[str, Layouts] = {}
_MOST_CORRECTED = 20_000


def _observe_fake(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    pricer: Pricer,
    left: Mapping[str, str] | None,
    knows_batch: bool,
) -> tuple[Observer, Costs] | Needs:
    """Observe fake runs until results lie in memory as those of real kernels do.

    Returns:
        The observer and the costs; where a run failed, for what the step needs data.
    """
    if len(_corrected) > _MOST_CORRECTED:
        _corrected.clear()
    with pricer.clock.part("observing"):
        surroundings = NamespaceSnapshot(step.loss)
    for _ in range(_MOST_FAKE_RUNS):
        while True:
            signatures = SignatureTable()
            with pricer.clock.part("observing"):
                found = observe_fake(
                    model, batch, step, signatures, _corrected, surroundings, left, knows_batch=knows_batch
                )
            if isinstance(found, Needs):
                return found
            observer = found
            if observer.checkpoints.is_consistent:
                break
            left = observer.checkpoints.left
        costs = pricer.price(signatures, observer.layouts)
        wrong = corrections(observer.layouts, {signatures.keys[i]: found for i, found in costs.layouts.items()})
        if not wrong:
            break
        _log.info("%d fake kernels lay their results out otherwise than the real ones; observing again", len(wrong))
        _corrected.update(wrong)
    return observer, costs
