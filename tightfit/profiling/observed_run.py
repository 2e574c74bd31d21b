"""Run one step under the observer: on a structural copy with fake tensors, or for real with activations in a file."""

from __future__ import annotations

import enum
import functools
import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch

from tightfit._torch_private.autograd import forbids_saved_tensor_hooks, has_no_sizes
from tightfit._torch_private.dispatch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    fake_mode,
    lacks_an_address,
)
from tightfit._torch_private.modules import clips_by_foreach, is_compiled
from tightfit.device import device_for
from tightfit.device.memory import attribute_tensors
from tightfit.distributed.ddp import unseen_by_reducers
from tightfit.distributed.fsdp import is_sharded
from tightfit.errors import TightfitError, UnsupportedInput
from tightfit.interrupts import is_of_a_handler, safe_point
from tightfit.operators._checkpoint_private import taking_over
from tightfit.operators.escaped_memory import watching_memory, with_fast_paths
from tightfit.operators.pure_modules import are_plain, has_own_weights
from tightfit.operators.region_names import ROOT
from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
from tightfit.profiling.fsdp_copy import ShardedCopy
from tightfit.profiling.known_values import KnownValues
from tightfit.profiling.observer import Observer
from tightfit.profiling.output_strides import Layouts
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.structural_copy import copy_batch, copy_model, copy_optimizer
from tightfit.step.batch import batch_tensors
from tightfit.step.host_copy import CopyFile, memory_of
from tightfit.step.own_steps import own_steps
from tightfit.step.resident import tensors_beside
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step

_log = logging.getLogger(__name__)

#: What stands for an ordinary tensor while measuring.
_KINDS_OF_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)


class Needs(enum.Enum):
    """For what a step needs data."""

    SHAPES = "shapes depend on it"
    ADDRESSES = "code past the dispatcher takes the addresses of tensors"
    OTHERS = "something else"


def observe_fake(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    signatures: SignatureTable,
    layouts: Mapping[str, Layouts],
    surroundings: NamespaceSnapshot,
    left_checkpoints: Mapping[str, str] | None = MappingProxyType({}),
    *,
    knows_batch: bool = False,
) -> Observer | Needs:
    """Observe a run of a copy without data; `left_checkpoints` as for `Observer`.

    `knows_batch`: what the model asks of the batch's own numbers is answered (see `known_values`).

    Returns:
        The observer; where the run failed, for what the step needs data.
    """
    mode = fake_mode()
    device = device_for(model)
    with surroundings.removing_fakes(mode):
        try:
            while True:
                observer = Observer(
                    signatures,
                    device,
                    layouts=layouts,
                    left_checkpoints=left_checkpoints,
                    excluded=step.excluded,
                    mode=mode,
                )
                if not _observe_copy(model, batch, step, observer, mode, knows_batch=knows_batch):
                    break
        except BaseException as error:
            if isinstance(error, TightfitError) or not isinstance(error, Exception) or is_of_a_handler(error):
                if error.__traceback__ is not None:
                    traceback.clear_frames(error.__traceback__.tb_next)  # their variables hold fake tensors
                raise
            # As text: whoever keeps log records would keep the error, its frames, and the fake tensors in them.
            _log.info("the fake run failed (%s: %s); measuring with a real step", type(error).__name__, str(error))
            if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
                return Needs.SHAPES
            return Needs.ADDRESSES if lacks_an_address(error) else Needs.OTHERS
    return observer


def _observe_copy(
    model: torch.nn.Module, batch: Any, step: Step, observer: Observer, mode: FakeTensorMode, *, knows_batch: bool
) -> bool:
    """Observe a run of a copy; return whether it made gradients that the steps after it begin with."""
    # The fake run is the copy's: this puts back what a loss function does that reaches for the user's own objects.
    state = TrainingState(model, step.all_optimizers, also=(batch,), contents=False)
    # What it reaches is no copy, so that such a run fails; until then it may have changed something.
    reached = step.reached(model)
    state_of_reached = TrainingState(torch.nn.Module(), (), also=reached) if reached else None
    try:
        copied, copies = copy_model(model, mode)
        attributes = [copies[id(tensor)] for tensor in attribute_tensors(model)]
        fake_batch = copy_batch(batch, mode)
        known = KnownValues(batch_tensors(fake_batch), batch_tensors(batch)) if knows_batch else None
        with mode, _hushed("torch._subclasses.fake_tensor"):
            parameters: list[torch.Tensor] = list(copied.parameters())
            sharded = ShardedCopy(model, copies) if is_sharded(model) else None
            step.gradients.give(copied)
            if sharded is not None:
                sharded.watch(observer)
                copies, parameters = sharded.copies, sharded.parameters
            optimizers = [copy_optimizer(optimizer, copies) for optimizer in step.all_optimizers]
            beside = tensors_beside(model, batch, step.all_optimizers, reached)
            lacking = step.gradients.lacking(reached)
            beside += [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in lacking]
            observe(copied, parameters, fake_batch, step, optimizers, observer, beside, attributes, known)
            observer.margin_bytes = 0 if sharded is None else sharded.margin_bytes
            return step.gradients.learn(copied)
    finally:
        state.restore()
        if state_of_reached is not None:
            state_of_reached.restore()
        gc.collect()


@contextmanager
def _hushed(logger_name: str) -> Iterator[None]:
    """Silence a logger: a failing fake kernel is no news to the user, as measuring goes on with a real step."""
    logger = logging.getLogger(logger_name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def observe_concrete(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    signatures: SignatureTable,
    left_checkpoints: Mapping[str, str] | None = MappingProxyType({}),
    *,
    runs_native_code: bool = False,
) -> Observer:
    """Observe a real step, with what autograd saves moved to a file; afterwards everything is put back.

    `left_checkpoints` and `runs_native_code` as for `Observer`.

    Raises:
        UnsupportedInput: the model uses `torch.func` transforms in its forward, or nested tensors of strided layout.
    """
    reached = step.reached(model)
    state = TrainingState(model, step.all_optimizers, also=(batch, *reached))
    try:
        spill, unspill = _spill_to(CopyFile())
        device_for(model).warm_up(model)
        try:
            while True:
                observer = Observer(
                    signatures,
                    device_for(model),
                    spill=spill,
                    unspill=unspill,
                    left_checkpoints=left_checkpoints,
                    excluded=step.excluded,
                    runs_native_code=runs_native_code,
                )
                step.gradients.give(model, reached)
                beside = tensors_beside(model, batch, step.all_optimizers, reached)
                parameters, optimizers = list(model.parameters()), step.all_optimizers
                with unseen_by_reducers(model):
                    observe(model, parameters, batch, step, optimizers, observer, beside, attribute_tensors(model))
                if not step.gradients.learn(model, reached):
                    break
                state.restore()
        except RuntimeError as error:
            if has_no_sizes(error):
                raise UnsupportedInput(
                    "the model computes with nested tensors of strided layout (so does scaled_dot_product_attention of "
                    "jagged ones on a CPU). They have no sizes, so that neither a plan nor torch.utils.checkpoint can "
                    "keep account of them. Use layout=torch.jagged and operations that keep it, padded tensors, or "
                    "train this model without a budget."
                ) from error
            if not forbids_saved_tensor_hooks(error):
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
    """Return what moves whole storages to a file and back, without a further copy in memory on the way."""

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


def observe(
    model: torch.nn.Module,
    parameters: Sequence[torch.Tensor],
    batch: Any,
    step: Step,
    optimizers: Sequence[torch.optim.Optimizer],
    observer: Observer,
    beside: Sequence[torch.Tensor],
    attributes: Sequence[torch.Tensor],
    known: KnownValues | None = None,
) -> None:
    """Run the step under the observer.

    Args:
        model, batch, step, observer: as they are.
        parameters: the model's, as the optimizers see them.
        optimizers: the step's, or their copies: those that step, and then those that are idle.
        beside: tensors that only the loss reaches.
        attributes: tensors that the model's modules have as attributes.
        known: what the batch's tensors without data would hold; None: nobody may ask.
    """
    observer.known_values = known
    with torch.enable_grad(), own_steps(), nullcontext() if known is None else known.taken_for_real():
        observer.in_optimizer = True
        with observer.unobserved():  # the state that the first step allocates is there in every later one
            for optimizer in optimizers:
                optimizer.step()
        observer.in_optimizer = False
        for parameter in parameters:
            observer.add_resident(parameter, "parameters")
            if parameter.grad is not None:
                observer.add_resident(parameter.grad, "gradients")
        for buffer in (*model.buffers(), *attributes):
            observer.add_resident(buffer, "buffers")
        for optimizer in optimizers:
            for entries in optimizer.state.values():
                for entry in entries.values() if isinstance(entries, dict) else ():
                    if isinstance(entry, torch.Tensor):
                        observer.add_resident(entry, "optimizer_state")
        for tensor in batch_tensors(batch):
            observer.add_resident(tensor, "batch")
        for tensor in beside:
            observer.add_resident(tensor, "reached")
        stepping = optimizers[: len(step.optimizers)]
        with _watching_modules(model, observer):
            observer.start()
            try:
                watched = watching_memory(with_fast_paths(model), observer.mark_escaped)
                with watched, taking_over(observer.take_checkpoint):
                    loss = step.run_loss(model, batch)
                observer.checkpoints.note_graph(loss)
                safe_point()
                observer.begin_backward()
                loss.backward()
                safe_point()
                observer.begin_optimizer()
                if step.clip_norm is not None:
                    clipped = step.clipped(parameters, stepping)
                    gradients = [parameter.grad for parameter in clipped if parameter.grad is not None]
                    foreach = clips_by_foreach(gradients, FakeTensor)
                    torch.nn.utils.clip_grad_norm_(clipped, step.clip_norm, foreach=foreach)
                for optimizer in stepping:
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

        @functools.wraps(original)  # a model may look at its own forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            is_plain = are_plain((args, kwargs), _KINDS_OF_TENSORS) and has_own_weights(module)
            observer.enter_module(path, is_plain)
            try:
                return original(*args, **kwargs)
            finally:
                observer.exit_module()

        module.__dict__["forward"] = forward

    compiled = {id(part) for module in model.modules() if is_compiled(module) for part in module.modules()}
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and id(module) not in compiled:
            watch(path or ROOT, module)
    try:
        yield
    finally:
        for module, was_own, original in replaced:
            if was_own:
                module.__dict__["forward"] = original
            else:
                del module.__dict__["forward"]
