"""`measure`: observe one step, price its operations, and write down the profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any

import torch

from tightfit.device import Device, device_for
from tightfit.device.described.gpu import DescribedDevice
from tightfit.distributed.fsdp import ensure_sharded, is_sharded, process_group_of
from tightfit.interrupts import waiting_interrupts
from tightfit.operators.pure_modules import is_bare
from tightfit.operators.region_names import ROOT, is_module_below
from tightfit.profiling.described.observe import observe_described
from tightfit.profiling.excluded import keep_excluded
from tightfit.profiling.fsdp_collectives import collective_workspace
from tightfit.profiling.mechanism_cost import Overhead, eviction_ratio, measure_overhead
from tightfit.profiling.observation import Observation
from tightfit.profiling.observed_step import Clock, ObservedStep, Pricer, observe_step
from tightfit.profiling.profile_tables import build_tables
from tightfit.profiling.regions import choose_regions
from tightfit.progress import progress
from tightfit.records import COMPONENTS, Profile
from tightfit.step.batch import describe_batch
from tightfit.step.exclude import is_inside
from tightfit.step.fingerprint import fingerprint
from tightfit.step.model import check_model, device_of
from tightfit.step.models import name_of, paths_of_models
from tightfit.step.resident import bytes_held
from tightfit.step.step import Step


def measure_together(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    *,
    budget_bytes: int | None = None,
    cost_cache: bool = True,
    as_it_is: bool = False,
) -> Profile:
    """Measure as `measure_step` does; of a sharded model, rank 0 does so for all who have a batch like its.

    All processes of a sharded model call this.
    """
    check_model(model)
    group = process_group_of(model)

    def mine() -> Profile:
        return measure_step(model, batch, step, budget_bytes=budget_bytes, cost_cache=cost_cache, as_it_is=as_it_is)

    if group.is_single_process:
        return mine()
    collective_workspace(group, device_of(model))
    described = describe_batch(batch)
    firsts = group.broadcast(described)
    measured = group.broadcast(group.run_on_all(lambda: mine() if group.is_main_process else None))
    return group.run_on_all(lambda: measured if measured is not None and described == firsts else mine())


@waiting_interrupts()
def measure_step(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    *,
    concrete: bool = False,
    cost_cache: bool = True,
    untimed: bool = False,
    budget_bytes: int | None = None,
    as_it_is: bool = False,
) -> Profile:
    """Measure one step, in this process.

    Args:
        model, batch, step, cost_cache: as for `measure`.
        concrete: skip the run without data.
        untimed: skip all measuring of times; they are zero.
        budget_bytes: estimate operations that cannot be run alone within it, beside what the model holds; they say so.
        as_it_is: let the model checkpoint itself as it does without a plan.
    """
    clock = Clock()
    check_model(model)
    ensure_sharded(model)
    pricer = Pricer(model, batch, step, clock, cost_cache=cost_cache, timed=not untimed, budget_bytes=budget_bytes)
    left: Mapping[str, str] | None = None if as_it_is else {}
    progress("observing a step")
    observed = observe_step(model, batch, step, pricer, concrete=concrete, left_checkpoints=left)

    def mechanism(evicted: float) -> Overhead:
        progress("timing recomputation itself")
        with clock.part("mechanism"):
            return Overhead() if untimed else measure_overhead(pricer.device, pricer.cache, evicted)

    held_bytes = bytes_held(model, batch, step.all_optimizers, step.reached(model))
    return _profile(model, batch, step, observed, device_for(model), held_bytes, str(pricer.device), clock, mechanism)


def measure_described(
    model: torch.nn.Module, batch: Any, step: Step, device: DescribedDevice, *, as_it_is: bool = False
) -> Profile:
    """Measure one step for a device that is not here; `as_it_is` as for `measure_step`.

    Raises:
        UnsupportedInput: the step cannot run without data.
    """
    clock = Clock()
    with clock.part("observing"):
        observed = observe_described(model, batch, step, device, None if as_it_is else {})
    return _profile(model, batch, step, observed, device, 0, device.card.name, clock, lambda _: Overhead())


def _profile(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    observed: ObservedStep,
    device: Device,
    held_bytes: int,
    device_name: str,
    clock: Clock,
    mechanism: Callable[[float], Overhead],
) -> Profile:
    """Write down what was observed.

    Args:
        model, batch, step, observed, clock: as they are.
        device: where the step runs.
        held_bytes: what the allocator there holds now of the step's own.
        device_name: how the profile names it.
        mechanism: returns what the mechanism costs there, by the `eviction_ratio`.
    """
    observer, signatures = observed.observer, observed.costs.signatures
    seen = observer.observation
    class_of = {path or ROOT: type(module).__name__ for path, module in model.named_modules()}
    keep_excluded(seen, step.excluded)
    region_paths = choose_regions(seen, class_of, step.excluded, paths_of_models(model))
    called_once = {*step.excluded, *observer.under_hooks}
    tables = build_tables(seen, region_paths, signatures, _callable_again(model, region_paths, called_once))
    overhead = mechanism(eviction_ratio(tables["ops"], tables["values"], tables["storages"]))
    component_bytes = _bytes_by_component(seen)
    allocator = device.allocator_state(held_bytes, {signature.name for signature in signatures})
    profile = Profile(
        model=name_of(model),
        fingerprint=fingerprint(model),
        batch=describe_batch(batch),
        device=device_name,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        baseline={part: nbytes for part, nbytes in component_bytes.items() if part != "activation"},
        signatures=signatures,
        region_paths=region_paths,
        optimizer=", ".join(type(o).__name__ for o in step.all_optimizers),
        accumulation_steps=step.accumulation_steps,
        method=observed.method,
        data_dependent=observed.data_dependent,
        switched_off=tuple(sorted(observer.switched_off)),
        margin_bytes=observer.margin_bytes,
        **asdict(overhead),
        random_state_bytes=observer.random_state_bytes,
        allocator=allocator,
        is_sharded=is_sharded(model),
        excluded=step.excluded,
        checkpoints=observer.checkpoints.decisions,
        measuring_ms=clock.measuring_ms(),
        **tables,
    )
    return profile.with_kept_graph() if step.retain_graph else profile


def _callable_again(
    model: torch.nn.Module, region_paths: Sequence[str], called_once: AbstractSet[str]
) -> AbstractSet[str]:
    """Return the regions whose whole forward can be recomputed: no module of `called_once` is in them."""
    around = {path for path in region_paths if any(is_inside(one, [path]) for one in called_once)}
    modules = {path: model.get_submodule(path) for path in region_paths if is_module_below(path)}
    return {
        path
        for path, module in modules.items()
        if path not in around and is_bare(module) and not isinstance(module, torch.jit.ScriptModule)
    }


def _bytes_by_component(seen: Observation) -> dict[str, int]:
    """Return the bytes of all storages, by what they belong to."""
    found = dict.fromkeys(COMPONENTS, 0)
    for storage in seen.storages:
        found[storage.component] += storage.nbytes
    return found
