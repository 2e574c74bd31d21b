"""`measure`: run one step on a structural copy with fake tensors (or, where that fails, for real with everything that
autograd saves moved to a file), and write down the profile.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from tightfit.device.memory import resident_bytes
from tightfit.distributed._fsdp_private import plain_class
from tightfit.distributed.fsdp import group_of, is_sharded, settle
from tightfit.errors import UnsupportedInput
from tightfit.operators.pure_modules import is_pure
from tightfit.operators.region_names import ROOT
from tightfit.profiling.cost_cache import CostCache, NoCache
from tightfit.profiling.costs import Costs, measure_costs
from tightfit.profiling.forward_check import ran_otherwise
from tightfit.profiling.fsdp_exchange import exchange_scratch
from tightfit.profiling.mechanism_cost import Overhead, eviction_ratio, measure_overhead
from tightfit.profiling.observed_run import observe_concrete, observe_fake
from tightfit.profiling.observer import Observer
from tightfit.profiling.output_strides import Layouts, corrections
from tightfit.profiling.profile_tables import build_tables
from tightfit.profiling.regions import choose_regions
from tightfit.profiling.signatures import SignatureTable
from tightfit.records import COMPONENTS, Profile
from tightfit.step.batch import describe_batch
from tightfit.step.fingerprint import fingerprint
from tightfit.step.model import check_model, device_of
from tightfit.step.step import LossFunction, Optimizers, Step, as_step

_log = logging.getLogger(__name__)

#: A profile whose shapes depend on the data states this margin: another batch may need that much more.
_DATA_DEPENDENT_MARGIN = 0.05

#: The first run finds which results lie in memory otherwise than a fake kernel says, the second one uses that; a third
#: is for operations that only the second one ran.
_MOST_FAKE_RUNS = 4


def measure(
    model: torch.nn.Module,
    batch: Any,
    *,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    cost_cache: bool = True,
) -> Profile:
    """Measure one training step.

    Args:
        model: any module; it is not changed.
        batch: one batch as training will give it. Without `loss`, a mapping becomes keyword arguments, a tuple
            positional arguments, anything else one argument.
        loss: called with (model, batch), returns a scalar tensor.
        optimizer: one, several, or None (then its state and step are in no figure).
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        cost_cache: use, and add to, the costs of single operations that this machine has measured before. The
            environment variable TIGHTFIT_COST_CACHE=off turns that off everywhere; TIGHTFIT_CACHE_DIR names the
            folder.

    Of a model that is sharded by `fully_shard`, all its processes have to call this.

    Raises:
        UnsupportedInput: nothing to train, no scalar loss, a compiled model, several devices.
    """
    spec = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    return measure_together(model, batch, spec, cost_cache=cost_cache)


def measure_together(
    model: torch.nn.Module, batch: Any, spec: Step, *, budget_bytes: int | None = None, cost_cache: bool = True
) -> Profile:
    """`measure_step`; of a sharded model by rank 0, for all who have a batch like its. All its processes call this."""
    check_model(model)
    group = group_of(model)

    def mine() -> Profile:
        return measure_step(model, batch, spec, budget_bytes=budget_bytes, cost_cache=cost_cache)

    if group.is_alone:
        return mine()
    exchange_scratch(group, device_of(model))
    described = describe_batch(batch)
    firsts = group.from_first(described)
    measured = group.from_first(group.together(lambda: mine() if group.is_first else None))
    return group.together(lambda: measured if measured is not None and described == firsts else mine())


def measure_step(
    model: torch.nn.Module,
    batch: Any,
    spec: Step,
    *,
    concrete: bool = False,
    cost_cache: bool = True,
    untimed: bool = False,
    budget_bytes: int | None = None,
) -> Profile:
    """`measure` for a `Step`; `concrete` skips the fake run, `untimed` all measuring of times (they are zero).
    Operations that cannot be run alone within `budget_bytes`, beside what the model holds, are estimated, and say so.
    """
    began = time.perf_counter()
    check_model(model)
    settle(model)
    device = device_of(model)
    cache = CostCache(device) if cost_cache and not untimed else NoCache()
    room_bytes = None if budget_bytes is None else budget_bytes - resident_bytes(model, batch, spec.optimizers)

    def price(table: SignatureTable) -> Costs:
        return measure_costs(
            table.calls, device, cache, timed=not untimed, room_bytes=room_bytes, result_bytes=table.result_bytes
        )

    observer: Observer | None = None
    data_dependent = False
    observing_s = scratch_ms = times_ms = 0.0
    layouts: dict[str, Layouts] = {}
    for _ in range(0 if concrete else _MOST_FAKE_RUNS):
        signatures = SignatureTable()
        begin = time.perf_counter()
        observer, data_dependent = observe_fake(model, batch, spec, signatures, layouts)
        observing_s += time.perf_counter() - begin
        if observer is None:
            break
        costs = price(signatures)
        scratch_ms, times_ms = scratch_ms + costs.scratch_ms, times_ms + costs.times_ms
        wrong = corrections(observer.layouts, {signatures.keys[i]: found for i, found in costs.layouts.items()})
        if not wrong:
            break
        _log.info("%d fake kernels lay their results out otherwise than the real ones; observing again", len(wrong))
        layouts |= wrong
    begin = time.perf_counter()
    is_parted = is_sharded(model)
    # A real forward of a sharded model needs all its processes; whether this one is right, the guarded run finds out.
    if observer is not None and not is_parted and ran_otherwise(observer.seen, model, batch, spec):
        _log.info("a real forward runs other operations than the fake one; measuring with a real step")
        observer = None
    method = "fake" if observer is not None else "real"
    if observer is None and is_parted:
        raise UnsupportedInput(
            "the model's shapes cannot be told without running it (they depend on the data, or a part of it cannot run "
            "without data), and a model that is sharded by fully_shard cannot be measured by running it yet. Use "
            "DistributedDataParallel for it, or train it without a budget."
        )
    if observer is None:
        signatures = SignatureTable()
        observer = observe_concrete(model, batch, spec, signatures)
    observing_s += time.perf_counter() - begin
    seen = observer.seen
    class_of = {path or ROOT: type(module).__name__ for path, module in model.named_modules()}
    region_paths = choose_regions(seen, class_of)
    if method == "real":
        costs = price(signatures)
        scratch_ms, times_ms = scratch_ms + costs.scratch_ms, times_ms + costs.times_ms
    baseline = dict.fromkeys((c for c in COMPONENTS if c != "activation"), 0)
    for storage in seen.storages:
        if storage.component != "activation":
            baseline[storage.component] += storage.nbytes
    # Under autocast, whether a weight is found cast already differs between the first and a second forward.
    pure_paths = {path for path in region_paths if path != ROOT and is_pure(model.get_submodule(path))}
    autocast = spec.autocast is not None or torch.is_autocast_enabled(device.type)
    tables = build_tables(seen, region_paths, costs.signatures, frozenset() if autocast else pure_paths)
    tabled = time.perf_counter()
    evicted = eviction_ratio(tables["ops"], tables["values"], tables["storages"])
    overhead = Overhead() if untimed else measure_overhead(device, cache, evicted)
    mechanism_ms = (time.perf_counter() - tabled) * 1e3
    activation_bytes = sum(s.nbytes for s in seen.storages if s.component == "activation")
    measuring_ms = {
        "observing": observing_s * 1e3,
        "scratch": scratch_ms,
        "times": times_ms,
        "mechanism": mechanism_ms,
    }
    measuring_ms["tables"] = max(0.0, (time.perf_counter() - began) * 1e3 - sum(measuring_ms.values()))
    return Profile(
        model=plain_class(model).__name__,
        fingerprint=fingerprint(model),
        batch=describe_batch(batch),
        device=str(device),
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        baseline=baseline,
        signatures=costs.signatures,
        region_paths=region_paths,
        optimizer=", ".join(type(o).__name__ for o in spec.optimizers),
        accumulation_steps=spec.accumulation_steps,
        method=method,
        data_dependent=data_dependent,
        margin_bytes=int(activation_bytes * _DATA_DEPENDENT_MARGIN) if data_dependent else observer.margin_bytes,
        mode_ms_per_op=overhead.mode_ms_per_op,
        tape_ms_per_op=overhead.tape_ms_per_op,
        module_ms_per_op=overhead.module_ms_per_op,
        module_ms_per_call=overhead.module_ms_per_call,
        random_state_bytes=observer.random_state_bytes,
        is_sharded=is_parted,
        measuring_ms={part: round(ms, 3) for part, ms in measuring_ms.items()},
        **tables,
    )
