"""Observe a step as it would run on a described GPU: on a structural copy, of tensors without data."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tightfit._torch_private.described import PLACE
from tightfit._torch_private.dispatch import DataDependentOutputException, DynamicOutputShapeException, fake_mode
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.described.names import DeviceNames
from tightfit.device.described.operations import as_on
from tightfit.device.memory import attribute_tensors
from tightfit.distributed.fsdp import is_sharded
from tightfit.errors import TightfitError, UnsupportedInput, first_line
from tightfit.interrupts import is_of_a_handler
from tightfit.profiling.costs import Costs
from tightfit.profiling.described.rates import estimate
from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
from tightfit.profiling.fsdp_copy import ShardedCopy
from tightfit.profiling.known_values import KnownValues
from tightfit.profiling.observed_run import observe
from tightfit.profiling.observed_step import ObservedStep
from tightfit.profiling.observer import Observer
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.structural_copy import copy_batch, copy_model, copy_optimizer
from tightfit.step.batch import batch_tensors
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step


def observe_described(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    device: DescribedDevice,
    left_checkpoints: Mapping[str, str] | None,
) -> ObservedStep:
    """Observe a step of a model, which may be anywhere, on meta too, as it would run on the device.

    `left_checkpoints` as for `Observer`.

    Raises:
        UnsupportedInput: it cannot run without data.
    """
    mode = fake_mode()
    failed = ""
    with NamespaceSnapshot(step.loss).removing_fakes(mode), as_on(device):
        try:
            while True:
                signatures = SignatureTable()
                observer = Observer(signatures, device, left_checkpoints=left_checkpoints, excluded=step.excluded)
                made_more = _observe_copy(model, batch, _seen_there(step), observer, mode)
                if not made_more and observer.checkpoints.is_consistent:
                    break
                left_checkpoints = observer.checkpoints.left
        except BaseException as error:
            if error.__traceback__ is not None:
                traceback.clear_frames(error.__traceback__.tb_next)  # their variables hold fake tensors
            if isinstance(error, TightfitError) or not isinstance(error, Exception) or is_of_a_handler(error):
                raise
            failed = _reason(error)
        else:
            costs = Costs(signatures=estimate(signatures.calls, signatures.result_bytes, device))
    if failed:
        raise UnsupportedInput(
            f"the step cannot be run without data, as it has to be for {device.name()}, which is not here: {failed}. "
            "So its memory cannot be predicted. Take that part out of the model, or measure on a device that is here."
        )
    return ObservedStep(observer=observer, costs=costs, method="fake", data_dependent=False)


def _observe_copy(model: torch.nn.Module, batch: Any, step: Step, observer: Observer, mode: Any) -> bool:
    """Observe a run of a copy; return whether it made gradients that the steps after it begin with."""
    state = TrainingState(model, step.all_optimizers, also=(batch,), contents=False)
    try:
        copied, copies = copy_model(model, mode, PLACE)
        attributes = [copies[id(tensor)] for tensor in attribute_tensors(model)]
        fake_batch = copy_batch(batch, mode, PLACE)
        known = KnownValues(batch_tensors(fake_batch), batch_tensors(batch))
        with mode:
            parameters: list[torch.Tensor] = list(copied.parameters())
            sharded = ShardedCopy(model, copies, PLACE) if is_sharded(model) else None
            step.gradients.give(copied)
            if sharded is not None:
                sharded.watch(observer)
                copies, parameters = sharded.copies, sharded.parameters
            optimizers = [copy_optimizer(optimizer, copies, foreach=True) for optimizer in step.all_optimizers]
            observe(copied, parameters, fake_batch, step, optimizers, observer, (), attributes, known)
            return step.gradients.learn(copied)
    finally:
        state.restore()
        gc.collect()


def _seen_there(step: Step) -> Step:
    """Return the step whose forward sees its tensors on CUDA."""

    @contextmanager
    def around_loss() -> Iterator[None]:
        with DeviceNames(), step.around_loss():
            yield

    return replace(step, around_loss=around_loss)


def _reason(error: Exception) -> str:
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return "what it does depends on the values of tensors"
    return f"it failed ({first_line(error)})"
