"""What a training step is: a model, a batch, a loss, perhaps optimizers.  Shared by measuring and verifying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private import tree_leaves
from tightfit.errors import UnsupportedInput
from tightfit.step.microbatch import Microbatch

LossFunction = Callable[[torch.nn.Module, Any], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """How to run one optimizer step, without the tensors it runs on."""

    loss: LossFunction | None = None
    """Called with (model, batch); None: the batch is unpacked into the model's call and the result must be a loss."""
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    accumulation_steps: int = 1
    """Forward and backward passes for each optimizer step."""
    autocast: torch.dtype | None = None
    """Run forward under torch.autocast with this dtype."""
    clip_norm: float | None = None
    """Clip the gradient's total norm before the optimizer step."""
    around_loss: Callable[[], Any] = field(default=nullcontext)
    """A context for the forward of model and loss (a plan's `<loss>` region)."""

    def run_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Forward of model and loss: a scalar tensor. Raises `UnsupportedInput` if it is not one.

        The loss of a `Microbatch` is multiplied by its weight.
        """
        microbatch = batch if isinstance(batch, Microbatch) else Microbatch(batch)
        batch = microbatch.batch
        with self.around_loss(), self._autocast(model):
            if self.loss is not None:
                result = self.loss(model, batch)
            elif isinstance(batch, Mapping):
                result = model(**batch)
            elif isinstance(batch, tuple):
                result = model(*batch)
            else:
                result = model(batch)
            return microbatch.weighted(check_loss(result, given=self.loss is not None))

    def run(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """One whole step: forward and backward `accumulation_steps` times, clipping, optimizers. Returns the last loss,
        detached. Gradients are added to what is there.
        """
        for _ in range(self.accumulation_steps):
            loss = self.run_loss(model, batch)
            (loss / self.accumulation_steps if self.accumulation_steps > 1 else loss).backward()
            loss = loss.detach()
        self.run_optimizers(model)
        return loss

    def run_optimizers(self, model: torch.nn.Module) -> None:
        """Clipping and the optimizers' steps."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()

    @contextmanager
    def _autocast(self, model: torch.nn.Module) -> Iterator[None]:
        if self.autocast is None:
            yield
        else:
            with torch.autocast(device_of(model).type, dtype=self.autocast):
                yield


def as_optimizers(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None) -> tuple[Any, ...]:
    """One optimizer, several, or None, as a tuple. Raises `UnsupportedInput` for one that needs a closure."""
    if optimizer is None:
        return ()
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for one in optimizers:
        if isinstance(one, torch.optim.LBFGS):
            raise UnsupportedInput(
                "the optimizer LBFGS runs forward and backward several times inside its own step, through a closure. "
                "A plan is for steps that call step() without one. Use another optimizer, or measure with "
                "optimizer=None, which leaves the optimizer's memory out of the figures."
            )
    return optimizers


def check_loss(result: Any, *, given: bool) -> torch.Tensor:
    """The scalar in what a model or loss function returned.

    Raises:
        UnsupportedInput: there is none, or it needs no gradient.
    """
    loss = result
    if not isinstance(loss, torch.Tensor):
        attribute = getattr(result, "loss", None)
        if attribute is None and isinstance(result, Mapping):
            attribute = result.get("loss")
        loss = attribute
    what = "the loss function" if given else "the model"
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(result).__name__
        raise UnsupportedInput(
            f"{what} returned {shape}, which is not a scalar loss. Backward starts from one number. "
            "Pass loss=, a function (model, batch) -> scalar tensor, or reduce the loss with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise UnsupportedInput(
            f"the scalar that {what} returned does not depend on any parameter that requires a gradient. There is "
            "nothing to train. Unfreeze parameters with requires_grad_(True), and do not detach the loss."
        )
    return loss


def check_model(model: Any) -> None:
    """Raises `UnsupportedInput` for a model that tightfit cannot plan."""
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedInput(
            f"the model is a {type(model).__name__}, not a torch.nn.Module. Regions are calls of modules. "
            "Wrap the computation in an nn.Module."
        )
    if isinstance(model, torch.nn.DataParallel):
        raise UnsupportedInput(
            "the model is an nn.DataParallel, which copies it into several threads at every step. A plan is for one "
            "forward at a time. Use one process per device (torchrun) instead."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedInput(
            f"{type(model).__name__} has no parameter that requires a gradient. There is nothing to train. "
            "Unfreeze parameters with requires_grad_(True)."
        )
    if any(hasattr(module, "_orig_mod") or _is_compiled_in_place(module) for module in model.modules()):
        raise UnsupportedInput(
            "the model is compiled with torch.compile, where operations do not pass through PyTorch's dispatcher and "
            "cannot be planned yet. Give tightfit the model as it was before torch.compile."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedInput(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}). A budget is for "
            "one device. Move the model to one device."
        )


def _is_compiled_in_place(module: torch.nn.Module) -> bool:
    """`module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def give_gradients(model: torch.nn.Module) -> None:
    """Zero gradients where there are none: they are resident from the start of forward, as in every step but the first.

    Those of embeddings that ask for sparse ones are sparse, and empty.
    """
    sparse = {id(module.weight) for module in model.modules() if getattr(module, "sparse", False) is True}
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.grad is not None:
            continue
        if id(parameter) in sparse:
            parameter.grad = torch.sparse_coo_tensor(
                torch.empty(1, 0, dtype=torch.long, device=parameter.device),
                parameter.new_empty(0, *parameter.shape[1:]),
                parameter.shape,
                check_invariants=False,
            )
        else:
            parameter.grad = torch.zeros_like(parameter)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device


def batch_tensors(batch: Any) -> list[torch.Tensor]:
    """Tensors in a batch of nested containers; an unknown container is searched through its attributes."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, torch.nn.Module | type):
            found += [value for value in vars(leaf).values() if isinstance(value, torch.Tensor)]
    return found


def describe_batch(batch: Any) -> str:
    """Shapes and dtypes, for people and for recognising a batch of the same kind."""
    return ", ".join(
        f"{str(t.dtype).removeprefix('torch.')}[{'x'.join(map(str, t.shape))}]" for t in batch_tensors(batch)
    )
