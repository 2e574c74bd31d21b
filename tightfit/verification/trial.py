"""Steps taken from one fixed state, plain and under plans, with their peaks and results; afterwards all is put back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from types import TracebackType
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.device import memory as meter
from tightfit.distributed.ddp import unseen_by_reducers
from tightfit.distributed.dtensor import local_shard
from tightfit.distributed.fsdp import process_group_of
from tightfit.errors import DeviceLost
from tightfit.installation.applied import Applied
from tightfit.progress import progress
from tightfit.records import DROPPED_SLOT_HOST_BYTES, TAPED_OP_HOST_BYTES
from tightfit.step.model import device_of
from tightfit.step.own_steps import own_steps
from tightfit.step.resident import bytes_held
from tightfit.step.results import Keep, Results, results_of
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step
from tightfit.verification.marks import keeper

#: Steps of a training after which the allocator's cache is taken to be as it stays.
_MOST_WARM_UP_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of several steps left behind, outside the device's memory."""

    steps: int
    """How many steps were run."""
    results: Results
    """Losses, parameters, gradients, buffers, attributes and the random state by name."""
    peak_bytes: int
    replayed_ops: int
    mismatches: int
    tape_host_bytes: int


class Trial:
    """Run steps of one model on one batch from one fixed state, plain and under any number of plans, one at a time.

    The state is noted before the first run, and put back when the trial is left as a context: all runs between are of
    one trial, however many plans are tried in it.  They start from that state, with gradients and the optimizer's state
    resident as in every step but a training's first.  Of parameters and optimizer state there is one copy outside the
    device's memory, and one of gradients that were there before.
    """

    def __init__(self, model: torch.nn.Module, batch: Any, step: Step) -> None:
        self.model = model
        self.batch = batch
        self.step = step
        self.device = device_of(model)
        self.group = process_group_of(model)
        """Those who have to take each step together."""
        self.steps_run = 0
        """How often the step was run, plain or planned."""
        self._contexts = ExitStack()
        self._given: TrainingState | None = None
        self._start: TrainingState | None = None

    def __enter__(self) -> Trial:
        self._contexts.enter_context(unseen_by_reducers(self.model))
        self._contexts.enter_context(own_steps())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DeviceLost):  # what it held is gone
            self._contexts.close()
            return
        with self._contexts:
            self.restore()
        device_for(self.device).give_back()  # a plain step may have taken more than the budget

    def restore(self) -> None:
        """Put the model back as it was given, and hold no memory for further runs; the next one notes its own state."""
        if self._given is not None:
            self._given.restore()
            self._given = self._start = None

    def run_self_checked(self, applied: Applied, steps: int = 1) -> Outcome:
        """Run the installed plan: first one step in which every region checks its replay, then `steps`, metered.

        Where the allocator keeps what is freed, the peak is that of a whole training's first steps.
        """
        progress("checking recomputation")
        if any(self.group.all_gather(applied.installed)):
            self.go_to_start()
            self._take(self._planned(applied))
            self._learn_of_gradients()
        outcome = self.run_planned(applied, steps)
        if self._learn_of_gradients():
            outcome = self.run_planned(applied, steps)
        if not device_for(self.device).caches_memory:
            return outcome
        return replace(outcome, peak_bytes=max(outcome.peak_bytes, self._training_peak(self._planned(applied))))

    def run_planned(
        self,
        applied: Applied,
        steps: int = 1,
        *,
        inside: AbstractContextManager[None] | None = None,
        copied: AbstractSet[str] | None = None,
    ) -> Outcome:
        """Run `steps` steps under the installed plan, metered, inside a further context.

        `copied`: as for `keeper`.
        """
        return self._run(self._planned(applied), applied, steps, inside or nullcontext(), keeper(copied))

    def run_plain(self, applied: Applied, steps: int = 1, *, copied: AbstractSet[str] | None = None) -> Outcome:
        """Run `steps` steps as if no plan were installed, metered; `copied` as for `keeper`."""
        return self._run(self.step, applied, steps, applied.paused(), keeper(copied))

    def bytes_held(self) -> int:
        """Return what the allocator took for all that a step finds, as things are now."""
        return bytes_held(self.model, self.batch, self.step.all_optimizers, self._reached())

    def times_ms(self, applied: Applied, *, plain: bool, rounds: int) -> tuple[float, float]:
        """Return the median times of a planned and a plain step, the runs interleaved; plain is 0 unless asked for."""
        planned_ms: list[float] = []
        plain_ms: list[float] = []
        step = self._planned(applied)
        for number in range(rounds):
            progress("timing steps", number, rounds)
            self.go_to_start()
            planned_ms.append(device_for(self.device).time_ms(lambda: self._take(step)))
            if plain:
                self.go_to_start()
                with applied.paused():
                    plain_ms.append(device_for(self.device).time_ms(lambda: self._take(self.step)))
        return statistics.median(planned_ms), statistics.median(plain_ms) if plain else 0.0

    def _training_peak(self, step: Step) -> int:
        """Return the peak of steps that begin where the user's will, repeated until they take no more.

        The first one finds no gradients and no optimizer state, perhaps, and makes them between activations, where they
        lie in the way of all others.  Then gradients are freed after each step, or kept: both are run.
        """
        assert self._given is not None
        self._start = None  # it holds the optimizer's state
        self._given.restore()
        device_for(self.device).give_back()
        held = device_for(self.device).loop_tensors()
        most = 0
        for keeps_gradients in (False, True):
            before = -1
            for _ in range(_MOST_WARM_UP_STEPS):
                _, peak = meter.measure_peak(lambda: self._take(step), 0, self.device, from_empty=False)
                most = max(most, peak)
                if not any(self.group.all_gather(peak != before)):
                    break
                before = peak
                self._clear_gradients(keeps_gradients)
        del held
        return most

    def _take(self, step: Step) -> torch.Tensor:
        self.steps_run += 1
        return step.run(self.model, self.batch)

    def _planned(self, applied: Applied) -> Step:
        return replace(self.step, around_loss=lambda: applied.step(self.batch, kind=self.step.kind or None))

    def go_to_start(self) -> None:
        """Put the model where each run starts from, as every run does by itself."""
        if self._start is not None:
            self._start.restore()
            return
        if self._given is None:
            self._given = TrainingState(self.model, self.step.all_optimizers, also=self._beside())
        else:
            self._given.restore()
        try:
            self._start = self._reach_steady_state(self._given)
        except BaseException:
            self.restore()
            raise

    def snapshot_at_start(self, module: torch.nn.Module, also: Sequence[object] = ()) -> TrainingState:
        """Note a part of the model, which is where `go_to_start` put it, without a further copy of its parameters."""
        return TrainingState(module, (), also=also, known=self._start)

    def _beside(self) -> tuple[Any, ...]:
        """Return what a step may change beside the model and the optimizers."""
        return self.batch, *self._reached()

    def _reached(self) -> tuple[Any, ...]:
        """Return what only the loss reaches."""
        return self.step.reached(self.model)

    def _reach_steady_state(self, given: TrainingState) -> TrainingState:
        """Make gradients and the optimizer's state resident, and note the state in which runs start."""
        without = self.step.gradients.give(self.model, self._reached())
        for optimizer in self.step.all_optimizers:
            optimizer.step()
        given.restore_contents()  # the parameters are where they were, and known
        made = [local_shard(p.grad) for p in without if p.grad is not None and p.grad.layout is torch.strided]
        for gradient in made:
            gradient.zero_()  # whatever the optimizer did to it
        return TrainingState(self.model, self.step.all_optimizers, also=self._beside(), known=given, zeros=made)

    def _learn_of_gradients(self) -> bool:
        """Return whether a run made gradients that are there from now on: then runs start from another state."""
        if not self.step.gradients.learn(self.model, self._reached()):
            return False
        self._start = None
        return True

    def _run(
        self, step: Step, applied: Applied, steps: int, inside: AbstractContextManager[None], keep: Keep
    ) -> Outcome:
        self.go_to_start()  # outside the context, or it would take back what that does to the model
        counts = applied.statistics
        results: dict[str, object] = {}
        peak_bytes = 0
        with inside:
            for number in range(1, steps + 1):
                counts.reset()
                resident = self.bytes_held()
                step_loss, peak = meter.measure_peak(lambda: self._take(step), resident, self.device)
                peak_bytes = max(peak_bytes, peak)
                name = f"loss of step {number}"
                results[name] = keep(name, step_loss)
                if number < steps:
                    self._clear_gradients(keep=True)
        for name, parameter in self.model.named_parameters():
            results[f"parameter {name}"] = keep(f"parameter {name}", local_shard(parameter))
        return Outcome(
            steps=steps,
            results=results | results_of(self.model, keep) | self._results_of_reached(keep),
            peak_bytes=peak_bytes,
            replayed_ops=counts.replayed_ops,
            mismatches=counts.mismatches + counts.unplanned_calls,
            tape_host_bytes=(counts.taped_ops * TAPED_OP_HOST_BYTES + counts.dropped_slots * DROPPED_SLOT_HOST_BYTES),
        )

    def _results_of_reached(self, keep: Keep) -> dict[str, object]:
        """Return what a run left behind in modules that only the loss reaches."""
        known = set(self.model.modules())
        modules = [one for one in self._reached() if isinstance(one, torch.nn.Module)]
        beside = [part for one in modules for part in _parts_beside(one, known)]
        if not beside:
            return {}
        names = {f"<{type(one).__name__} {number}>": one for number, one in enumerate(beside)}
        return results_of(torch.nn.ModuleDict(names), keep)

    def _clear_gradients(self, keep: bool) -> None:
        reached = [one.parameters() for one in self._reached() if isinstance(one, torch.nn.Module)]
        for parameter in chain(self.model.parameters(), *reached):
            if not keep:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()


def _parts_beside(module: torch.nn.Module, known: AbstractSet[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """Yield a module that shares nothing with the known ones, or those of its parts that share nothing."""
    if known.isdisjoint(module.modules()):
        yield module
    elif module not in known:
        for child in module.children():
            yield from _parts_beside(child, known)
