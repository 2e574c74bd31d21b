"""`measure`: run one step on a structural copy with fake tensors (or, where that fails, for real with everything that
autograd saves moved to a file), and write down the profile.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tightfit._torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from tightfit.device.memory import resident_bytes
from tightfit.distributed._fsdp_private import unsharded_class
from tightfit.distributed.fsdp import collective_workspace, ensure_sharded, is_sharded, process_group_of
from tightfit.errors import TightfitError, UnsupportedInput
from tightfit.operators.escaped_memory import watching_exposure, with_fast_paths
from tightfit.operators.region_names import ROOT
from tightfit.profiling.cost_cache import CostCache, NoCache
from tightfit.profiling.costs import Costs, measure_costs
from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
from tightfit.profiling.forward_check import forward_differs
from tightfit.profiling.fsdp_copy import ShardedCopy
from tightfit.profiling.mechanism_cost import Overhead, eviction_ratio, measure_overhead
from tightfit.profiling.observer import Observer
from tightfit.profiling.output_strides import Layouts, corrections
from tightfit.profiling.profile_tables import build_tables
from tightfit.profiling.regions import choose_regions
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.structural_copy import copy_batch, copy_model, copy_optimizer
from tightfit.records import COMPONENTS, Profile
from tightfit.replay.module_recompute import are_plain, is_pure
from tightfit.step.host_copy import CopyFile, memory_of
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import (
    LossFunction,
    StepSpec,
    as_optimizers,
    batch_tensors,
    check_model,
    describe_batch,
    device_of,
    give_gradients,
)

_log = logging.getLogger(__name__)

#: A profile whose shapes depend on the data states this margin: another batch may need that much more.
_DATA_DEPENDENT_MARGIN = 0.05

#: The first run finds which results lie in memory otherwise than a fake kernel says, the second one uses that; a third
#: is for operations that only the second one ran.
_MOST_FAKE_RUNS = 4
#: What stands for an ordinary tensor while measuring.
_KINDS_OF_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def measure(
    model: torch.nn.Module,
    batch: Any,
    *,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
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
    spec = StepSpec(
        loss=loss,
        optimizers=as_optimizers(optimizer),
        accumulation_steps=accumulation_steps,
        autocast=autocast,
        clip_norm=clip_norm,
    )
    return measure_together(model, batch, spec, cost_cache=cost_cache)


def measure_together(
    model: torch.nn.Module, batch: Any, spec: StepSpec, *, budget_bytes: int | None = None, cost_cache: bool = True
) -> Profile:
    """`measure_step`; of a sharded model by rank 0, for all who have a batch like its. All its processes call this."""
    check_model(model)
    group = process_group_of(model)

    def mine() -> Profile:
        return measure_step(model, batch, spec, budget_bytes=budget_bytes, cost_cache=cost_cache)

    if group.is_single_process:
        return mine()
    collective_workspace(group, device_of(model))
    described = describe_batch(batch)
    firsts = group.broadcast(described)
    measured = group.broadcast(group.run_on_all(lambda: mine() if group.is_main_process else None))
    return group.run_on_all(lambda: measured if measured is not None and described == firsts else mine())


def measure_step(
    model: torch.nn.Module,
    batch: Any,
    spec: StepSpec,
    *,
    concrete: bool = False,
    cost_cache: bool = True,
    untimed: bool = False,
    budget_bytes: int | None = None,
) -> Profile:
    """`measure` for a `StepSpec`; `concrete` skips the fake run, `untimed` all measuring of times (they are zero).
    Operations that cannot be run alone within `budget_bytes`, beside what the model holds, are estimated, and say so.
    """
    began = time.perf_counter()
    check_model(model)
    ensure_sharded(model)
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
        observer, data_dependent = _observe_fake(model, batch, spec, signatures, layouts)
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
    if observer is not None and not is_parted and forward_differs(observer.observation, model, batch, spec):
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
        observer = _observe_concrete(model, batch, spec, signatures)
    observing_s += time.perf_counter() - begin
    seen = observer.observation
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
        model=unsharded_class(model).__name__,
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
        rerun_ms_per_op=overhead.rerun_ms_per_op,
        rerun_ms_per_call=overhead.rerun_ms_per_call,
        random_state_bytes=observer.random_state_bytes,
        is_sharded=is_parted,
        measuring_ms={part: round(ms, 3) for part, ms in measuring_ms.items()},
        **tables,
    )


def fingerprint(model: torch.nn.Module) -> str:
    """Digest of the names, shapes and dtypes of parameters and buffers, and of which parameters train."""
    lines = [unsharded_class(model).__name__]
    lines += [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()]
    lines += [f"{n} {tuple(b.shape)} {b.dtype}" for n, b in model.named_buffers()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _observe_fake(
    model: torch.nn.Module,
    batch: Any,
    spec: StepSpec,
    signatures: SignatureTable,
    layouts: Mapping[str, Layouts],
) -> tuple[Observer | None, bool]:
    """What was observed, None if the fake run failed; and whether it did because shapes depend on the data."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    surroundings = NamespaceSnapshot(spec.loss)
    observer = Observer(signatures, device_of(model).type, layouts=layouts)
    try:
        _observe_copy(model, batch, spec, observer, mode)
    except BaseException as error:
        if isinstance(error, TightfitError) or not isinstance(error, Exception):
            if error.__traceback__ is not None:
                traceback.clear_frames(error.__traceback__.tb_next)  # their variables hold fake tensors
            raise
        _log.info("the fake run failed (%s: %s); measuring with a real step", type(error).__name__, error)
        return None, isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    finally:
        surroundings.remove_fakes(mode)
    return observer, False


def _observe_copy(model: torch.nn.Module, batch: Any, spec: StepSpec, observer: Observer, mode: FakeTensorMode) -> None:
    # The fake run is the copy's: this puts back what a loss function does that reaches for the user's own objects.
    state = TrainingState(model, spec.optimizers, also=(batch,), contents=False)
    try:
        copied, copies = copy_model(model, mode)
        fake_batch = copy_batch(batch, mode)
        with mode, _hushed("torch._subclasses.fake_tensor"):
            parameters: list[torch.Tensor] = list(copied.parameters())
            sharded = ShardedCopy(model, copies) if is_sharded(model) else None
            give_gradients(copied)
            if sharded is not None:
                sharded.watch(observer)
                copies, parameters = sharded.copies, sharded.parameters
            optimizers = [copy_optimizer(optimizer, copies) for optimizer in spec.optimizers]
            _observe(copied, parameters, fake_batch, spec, optimizers, observer)
            observer.margin_bytes = 0 if sharded is None else sharded.margin_bytes
    finally:
        state.restore()
        gc.collect()


@contextmanager
def _hushed(logger_name: str) -> Iterator[None]:
    """A failing fake kernel is no news to the user: measuring goes on with a real step."""
    logger = logging.getLogger(logger_name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _observe_concrete(model: torch.nn.Module, batch: Any, spec: StepSpec, signatures: SignatureTable) -> Observer:
    state = TrainingState(model, spec.optimizers, also=(batch,))
    try:
        spill, unspill = _spill_to(CopyFile())
        observer = Observer(signatures, device_of(model).type, spill=spill, unspill=unspill)
        give_gradients(model)
        try:
            _observe(model, list(model.parameters()), batch, spec, list(spec.optimizers), observer)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise UnsupportedInput(
                "the model uses torch.func (grad, vjp, jacrev, hessian) in its forward. PyTorch forbids "
                "saved-tensor hooks there, and without them what autograd saves cannot be seen or dropped. Use "
                "torch.autograd.grad instead, or train this model without a budget."
            ) from error
        return observer
    finally:
        state.restore()


def _spill_to(file: CopyFile) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.UntypedStorage]]:
    """Whole storages to a file and back, without a further copy in memory on the way."""

    def spill(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
        return file.write(memory_of(flat.cpu())), storage.nbytes(), tensor.device

    def unspill(place: Any) -> torch.UntypedStorage:
        begin, nbytes, device = place
        data = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            file.read_into(begin, memory_of(data))
        return data.to(device).untyped_storage()

    return spill, unspill


def _observe(
    model: torch.nn.Module,
    parameters: Sequence[torch.Tensor],
    batch: Any,
    spec: StepSpec,
    optimizers: Sequence[torch.optim.Optimizer],
    observer: Observer,
) -> None:
    """`parameters`: the model's, as the optimizers see them."""
    with torch.enable_grad():
        observer.in_optimizer = True
        with observer.unobserved():  # the state that the first step allocates is there in every later one
            for optimizer in optimizers:
                optimizer.step()
        observer.in_optimizer = False
        for parameter in parameters:
            observer.add_resident(parameter, "parameters")
            if parameter.grad is not None:
                observer.add_resident(parameter.grad, "gradients")
        for buffer in model.buffers():
            observer.add_resident(buffer, "buffers")
        for optimizer in optimizers:
            for entries in optimizer.state.values():
                for entry in entries.values() if isinstance(entries, dict) else ():
                    if isinstance(entry, torch.Tensor):
                        observer.add_resident(entry, "optimizer_state")
        for tensor in batch_tensors(batch):
            observer.add_resident(tensor, "batch")
        with _watching_modules(model, observer):
            observer.start()
            try:
                with watching_exposure(with_fast_paths(model), observer.mark_escaped):
                    loss = spec.run_loss(model, batch)
                observer.begin_backward()
                loss.backward()
                observer.begin_optimizer()
                if spec.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)
                for optimizer in optimizers:
                    optimizer.step()
            finally:
                observer.stop()


@contextmanager
def _watching_modules(model: torch.nn.Module, observer: Observer) -> Iterator[None]:
    """Tell the observer of every module call, by an instance-level forward as a plan installs."""
    replaced: list[tuple[torch.nn.Module, bool, Any]] = []

    def watch(path: str, module: torch.nn.Module) -> None:
        original = module.forward
        replaced.append((module, "forward" in vars(module), original))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            observer.enter_module(path, are_plain((args, kwargs), _KINDS_OF_TENSORS))
            try:
                return original(*args, **kwargs)
            finally:
                observer.exit_module()

        module.__dict__["forward"] = forward

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            watch(path or ROOT, module)
    try:
        yield
    finally:
        for module, was_own, original in replaced:
            if was_own:
                module.__dict__["forward"] = original
            else:
                del module.__dict__["forward"]
