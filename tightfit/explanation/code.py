"""Code to paste, with the names that the script has for things."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from tightfit.units import format_budget, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Script:
    """How the code around a step looks."""

    model: str = "model"
    parts: tuple[str, ...] = ()
    """Where several models are trained together: their names."""
    batch: str = "batch"
    optimizers: tuple[str, ...] = ()
    host: str = ""
    """``transformers`` or ``lightning``, whose trainer takes the steps; empty: the script's own loop."""
    needs_loss: bool = True
    """The model does not return its own loss."""
    loss_lines: tuple[str, ...] = ()
    """The script's lines from the model's call to backward, for a function that computes the loss; none if unknown."""
    loss_result: str = "loss"
    loss_place: str = ""
    """Where they are: ``train.py, lines 31-33``."""
    used_elsewhere: tuple[str, ...] = ()
    """What these lines compute beside the loss, and the script reads elsewhere, or they themselves the next time."""
    let_go: tuple[str, ...] = ()
    """What these lines compute, and nothing else reads."""
    accumulation_steps: int = 1
    autocast: torch.dtype | None = None
    has_autocast: bool = False
    clip_norm: float | None = None
    excluded: tuple[str, ...] = field(default=())


_IMPORT_OF = {
    "transformers": "from tightfit.integrations.transformers import TightfitCallback",
    "lightning": "from tightfit.integrations.lightning import TightfitCallback",
}


def budget_text(budget_bytes: int) -> str:
    """Return a budget as code: text where that is exact.

    >>> budget_text(2**20), budget_text(1234567)
    ('"1.0MiB"', '1234567')
    """
    written = format_budget(budget_bytes).replace(" ", "")
    return f'"{written}"' if parse_bytes(written) == budget_bytes else str(budget_bytes)


def fit_code(script: Script, budget_bytes: int) -> str:
    """Return the code that keeps the script's step inside a budget."""
    budget = budget_text(budget_bytes)
    if script.host == "transformers":
        return f"{_IMPORT_OF[script.host]}\n\ntrainer.add_callback(TightfitCallback(budget={budget}))  # before train()"
    if script.host == "lightning":
        return f"{_IMPORT_OF[script.host]}\n\ntrainer = Trainer(..., callbacks=[TightfitCallback(budget={budget})])"
    lines = ["import tightfit", ""]
    if script.parts:
        parts = ", ".join(f'"{part.rpartition(".")[2]}": {part}' for part in script.parts)
        lines += [f"{script.model} = torch.nn.ModuleDict({{{parts}}})", ""]
    keywords = [f"budget={budget}"]
    if script.needs_loss:
        lines += _loss_function(script)
        keywords.append("loss=loss_of")
    if script.optimizers:
        several = ", ".join(script.optimizers)
        keywords.append(f"optimizer={several if len(script.optimizers) == 1 else f'[{several}]'}")
    if script.accumulation_steps > 1:
        keywords.append(f"accumulation_steps={script.accumulation_steps}")
    if script.autocast is not None and not (script.needs_loss and script.loss_lines):
        keywords.append(f"autocast={script.autocast}")
    if script.clip_norm is not None:
        keywords.append(f"clip_norm={script.clip_norm:g}")
    call = f"{script.model}, {script.batch}"
    lines += [
        "# once, before the loop, with one batch:",
        f"applied = tightfit.fit({call}, {', '.join(keywords)})",
        "",
        f"# in the loop, instead of {script.loss_place or 'model and loss'}:",
        *_use(script, call),
    ]
    return "\n".join(lines)


def _use(script: Script, call: str) -> list[str]:
    """Return the lines of the loop: its own where they compute more than the loss."""
    named = script.loss_result.isidentifier()  # else it is what a function returns
    if not script.used_elsewhere or not script.loss_lines:
        return [f"{f'{script.loss_result} =' if named else 'return'} applied.loss({call})"]
    lines = [f"with applied.step({script.batch}):", *(f"    {line}" for line in script.loss_lines)]
    if not named:
        lines.append(f"    return {script.loss_result}")
    elif script.let_go:
        lines.append(f"    del {', '.join(script.let_go)}  # as at a function's end: the budget does not count it")
    held = ", ".join(script.used_elsewhere)
    return [
        *lines,
        f"# {held}: read after the loss, too; what that holds comes on top of the budget",
        "# (and may be computed again beside it, if a later backward goes through it: measure the whole step)",
    ]


def _loss_function(script: Script) -> list[str]:
    own = script.model.rpartition(".")[2]
    lines = [f"def loss_of({own}, batch):"]
    if script.parts:
        lines.append(f"    {', '.join(script.parts)} = {own}.values()")
    if script.batch not in ("batch", "()"):
        lines.append(f"    {script.batch.strip('()')} = batch")
    body = script.loss_lines or ("...  # forward and loss, as the loop has them",)
    if own != script.model:
        body = tuple(re.sub(rf"\b{re.escape(script.model)}\b", own, line) for line in body)
    return [*lines, *(f"    {line}" for line in body), f"    return {script.loss_result}", ""]


def microbatch_code(script: Script, size: int) -> str:
    """Return the code that takes a step in two halves of its batch."""
    if script.host == "transformers":
        return (
            f"TrainingArguments(..., per_device_train_batch_size={size // 2}, "
            f"gradient_accumulation_steps={2 * script.accumulation_steps})"
        )
    if script.host == "lightning":
        return (
            f"DataLoader(..., batch_size={size // 2})\n"
            f"Trainer(..., accumulate_grad_batches={2 * script.accumulation_steps})"
        )
    step = f"{script.optimizers[0]}.step()" if script.optimizers else "the optimizer's step"
    return (
        f"# with batches of {size // 2}: {step} after every {2 * script.accumulation_steps} of them\n"
        f"({script.loss_result} / {2 * script.accumulation_steps}).backward()"
    )


def precision_code(script: Script, device: str) -> str:
    """Return the code that computes forward in bfloat16."""
    if script.host == "transformers":
        return "TrainingArguments(..., bf16=True)"
    if script.host == "lightning":
        return 'Trainer(..., precision="bf16-mixed")'
    kind = device.partition(":")[0]
    return f'with torch.autocast("{kind}", dtype=torch.bfloat16):\n    ...  # forward and loss; backward outside'


def foreach_code(script: Script, kind: str) -> str:
    """Return the code that makes an optimizer that goes through the parameters one by one."""
    return f"torch.optim.{kind}(..., foreach=False)"
