"""Explain what a watch has seen of a script."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from tightfit.device.budget import Budget
from tightfit.device.described.cards import Card
from tightfit.errors import first_line
from tightfit.explanation.address_space import left_free_bytes, limit_notes
from tightfit.explanation.breakdown import MODEL
from tightfit.explanation.code import Script
from tightfit.explanation.explain import explain_step
from tightfit.explanation.explanation import Explanation, Seen
from tightfit.explanation.knobs import knobs_of
from tightfit.explanation.program import UNKNOWN, SeenLoss
from tightfit.explanation.recorder import MemoryRecorder
from tightfit.explanation.seen_model import SeenModel
from tightfit.explanation.site import loss_source, place_of
from tightfit.explanation.source_loss import SourceLoss
from tightfit.explanation.watch import Findings, Pass, StepWatch, optimizers_of
from tightfit.step.model import device_of
from tightfit.step.step import Step
from tightfit.units import format_bytes

#: Left free of what there was when memory ran out.
_MARGIN = 0.03
_WORTH_A_NOTE = 0.01
_UNKNOWN_LOSS = "the loss went through code that is not PyTorch's, and cannot be computed again"


def explain_findings(
    watch: StepWatch, *, failure: str = "", memory: str = "auto", card: Card | None = None
) -> Explanation:
    """Explain the step that was seen, or the one in which memory ran out.

    Args:
        watch: of the script, removed.
        failure: the error, where memory ran out.
        memory: what there is for a step, as a budget; ``auto``: what there was, where it ran out.
        card: a GPU that is not here, which the step may be to run on.
    """
    recorder, findings = watch.recorder, watch.findings
    assert recorder is not None
    passes = [*findings.passes, *([findings.open_pass] if findings.open_pass is not None else [])]
    called = list({id(m): m for one in passes for m in one.modules}.values())
    names: dict[int, str] = {}
    for one in passes:
        for site in (one.called, one.backward):
            names = {**(site.names if site is not None else {}), **names}
    model = SeenModel(called, names)
    optimizers = findings.optimizers or optimizers_of(list(model.module.parameters()))
    _label_resident(recorder, model, optimizers)
    chosen = findings.open_pass or _pass_of_peak(recorder, findings)
    seen = Seen(
        breakdown=recorder.breakdown(model.name_of),
        steps=findings.steps,
        ran_out=_what_ran_out(recorder, failure),
    )
    beside_bytes = seen.breakdown.components["other"]
    target_bytes = None
    if memory != "auto":
        target_bytes = Budget.of(memory, device_of(model.module)).step_bytes
    elif failure:
        there_bytes = round((1 - _MARGIN) * seen.breakdown.total_bytes) - left_free_bytes()
        target_bytes = max(there_bytes - beside_bytes, 1)
    return _planned(
        seen,
        chosen,
        findings,
        model,
        optimizers,
        names,
        target_bytes,
        room_bytes=target_bytes if failure else None,
        card=card,
    )


def _label_resident(recorder: MemoryRecorder, model: SeenModel, optimizers: list[torch.optim.Optimizer]) -> None:
    owner_of: dict[int, torch.nn.Module] = {}
    for module in model.module.modules():
        for weight in module.parameters(recurse=False):
            owner_of.setdefault(id(weight), module)
            recorder.label(weight, "parameters", owner_of[id(weight)])
            if weight.grad is not None:
                recorder.label(weight.grad, "gradients", owner_of[id(weight)])
        for buffer in module.buffers(recurse=False):
            recorder.label(buffer, "buffers", module)
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for entry in entries.values() if isinstance(entries, dict) else ():
                if isinstance(entry, torch.Tensor):
                    recorder.label(entry, "optimizer_state", owner_of.get(id(parameter), MODEL))


def _pass_of_peak(recorder: MemoryRecorder, findings: Findings) -> Pass:
    """Return the pass in which the peak was, or the last one: that of the peak is of the step before, perhaps."""
    place = recorder.peak_place
    return next((one for one in findings.passes if place < one.place), findings.passes[-1])


def _what_ran_out(recorder: MemoryRecorder, failure: str) -> str:
    if not failure:
        return ""
    told = recorder.failed or failure
    asked = re.search(r"allocate (\d+) bytes", told)
    operation = recorder.failed.partition(":")[0]
    where = f" by {operation}" if operation else ""
    return f"{format_bytes(int(asked[1]))} more were asked for{where}" if asked else told.splitlines()[0]


def _planned(
    seen: Seen,
    chosen: Pass,
    findings: Findings,
    model: SeenModel,
    optimizers: list[torch.optim.Optimizer],
    names: Mapping[int, str],
    target_bytes: int | None,
    room_bytes: int | None,
    card: Card | None,
) -> Explanation:
    """Plan the step that was seen; where that cannot be, say why."""
    notes = list(limit_notes() if seen.ran_out else ())
    beside_bytes = seen.breakdown.components["other"]
    if beside_bytes > _WORTH_A_NOTE * seen.breakdown.total_bytes:
        notes.append(f"{format_bytes(beside_bytes)} of tensors are beside the step: data, copies, other models")
    kinds = {tuple(id(module) for module in one.modules) for one in findings.passes}
    if len(findings.passes) > 1 and (len(kinds) > 1 or len(findings.optimizers) > 1):
        notes.append(
            f"the step has {len(findings.passes)} backward passes: the one that the peak is in is planned, by itself"
        )
    autocast = chosen.program.autocast if chosen.program is not None else None
    why = ""
    for loss, note in _losses(chosen, model):
        try:
            step = Step(
                loss=loss,
                optimizer=optimizers,
                accumulation_steps=_accumulation_steps(findings),
                autocast=autocast if isinstance(loss, SourceLoss) else None,
                clip_norm=findings.clip_norm,
            )
            script = _script(chosen, model, optimizers, names, step, loss)
            found = explain_step(
                model.module, loss.batch, step, script, target_bytes=target_bytes, room_bytes=room_bytes, seen=seen,
                notes=(*notes, *note), around=chosen.modules, card=card,
            )  # fmt: skip
        except Exception as problem:  # of the script's own code, too, which is called again
            why = first_line(problem)
            continue
        return _with_leftovers(found, model)
    notes.append(
        f"nothing could be planned: {why or _UNKNOWN_LOSS}. Call tightfit.explain(model, batch, loss=...) in the script"
    )
    return Explanation(
        model=type(model.module).__name__,
        batch="unknown",
        device=str(device_of(model.module)),
        step=None,
        seen=seen,
        target_bytes=target_bytes,
        knobs=knobs_of(
            model.module, optimizers, None, autocast=autocast, accumulation_steps=_accumulation_steps(findings),
            clip_norm=findings.clip_norm, around=chosen.modules,
        ),
        notes=tuple(notes),
    )  # fmt: skip


def _with_leftovers(found: Explanation, model: SeenModel) -> Explanation:
    """Name several models by their classes, and say what a complete step held beyond its own."""
    if model.is_made:
        return replace(found, model=" and ".join(_class_names(model.module)))
    seen, step = found.seen, found.step
    if seen is None or step is None or seen.ran_out:
        return found
    more_bytes = seen.breakdown.total_bytes - seen.breakdown.components["other"] - step.total_bytes
    if more_bytes <= _WORTH_A_NOTE * step.total_bytes:
        return found
    note = (
        f"{format_bytes(more_bytes)} of the peak are not the step's own: the script's variables hold results of the "
        f"step before. `del` them before the next forward"
    )
    return replace(found, notes=(*found.notes, note))


def _losses(chosen: Pass, model: SeenModel) -> Iterator[tuple[SeenLoss | SourceLoss, tuple[str, ...]]]:
    """Yield what may be called again for the step's loss, the truest first, each with what is to be said of it."""
    program = chosen.program
    if program is not None and not program.is_complete:
        program = None
    if program is not None and program.result != UNKNOWN:
        yield SeenLoss(program, model.module, model.path_of), ()
    if chosen.source is not None:
        chosen.source.use_paths(model.path_if_inside)
        yield chosen.source, ("memory ran out before the loss: the script's next lines were planned with the step",)
    if program is not None and program.result == UNKNOWN:
        yield (
            SeenLoss(program, model.module, model.path_of),
            ("memory ran out in forward: what the script would have made of the result is a stand-in here",),
        )


def _class_names(module: torch.nn.Module) -> list[str]:
    return [type(child).__name__ for child in module.children()]


def _accumulation_steps(findings: Findings) -> int:
    """Return how many passes of a step have the same modules as the last one; those of a GAN differ."""
    if not findings.passes or not findings.steps:
        return 1
    kinds = [tuple(id(module) for module in one.modules) for one in findings.passes]
    return len(kinds) if len(set(kinds)) == 1 and len(findings.optimizers) == 1 else 1


def _script(
    chosen: Pass,
    model: SeenModel,
    optimizers: list[torch.optim.Optimizer],
    names: Mapping[int, str],
    step: Step,
    loss: SeenLoss | SourceLoss,
) -> Script:
    call, program = chosen.called, chosen.program
    autocast = None if program is None else program.autocast
    source = None if call is None else loss_source(call, chosen.backward)
    lines = () if source is None else source.lines
    ordered = list(dict.fromkeys(loss.batch_names))
    read = [] if source is None or call is None else source.names_read()
    if read and not set(ordered) <= set(read):  # what the batch was made of in this step, as slices of a corpus
        tensors = set() if call is None else {name for _, name in call.tensors.values()}
        ordered = [name for name in read if name in tensors] or ordered
    batch = "batch" if not ordered or "" in ordered else ordered[0] if len(ordered) == 1 else f"({', '.join(ordered)})"
    whole = [unnamed for unnamed in (names.get(id(m)) for m in chosen.modules) if unnamed]
    parts = tuple(names.get(id(module)) or name for name, module in model.module.named_children())
    parts = parts if model.is_made else ()
    return Script(
        model="models" if parts else names.get(id(model.module)) or (whole[0] if len(whole) == 1 else "model"),
        parts=parts,
        batch=batch,
        optimizers=tuple(names.get(id(one)) or "optimizer" for one in optimizers),
        host=call.host if call is not None else "",
        needs_loss=source is not None or program is None or not program.returns_loss,
        loss_lines=lines,
        used_elsewhere=() if source is None else source.used_elsewhere,
        let_go=() if source is None else source.names_let_go(),
        loss_result="loss" if source is None else ast.unparse(source.result),
        loss_place=place_of(call, len(lines)) if call is not None and lines else "",
        accumulation_steps=step.accumulation_steps,
        autocast=autocast,
        has_autocast=autocast is not None,
        clip_norm=step.clip_norm,
    )
