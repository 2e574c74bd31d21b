"""Find the training step in a script that runs unchanged, and record it.

What is replaced while the script runs: `nn.Module.__call__` (which module runs), `torch.autograd.backward` (where a
loss is), `clip_grad_norm_`, and hooks around every optimizer's step.  All of them go on to the original.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tightfit._torch_private.dispatch import top_function_mode
from tightfit.device import device_for
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.explanation.program import Program, ProgramRecorder, tensors_of
from tightfit.explanation.recorder import MemoryRecorder
from tightfit.explanation.site import Site, current_site, script_frame
from tightfit.explanation.source_loss import SourceLoss, source_loss
from tightfit.step.batch import batch_tensors

#: Backward passes without an optimizer's step, of a script that has no optimizer.
_MOST_PASSES = 2
_MOST_PASSES_OF_A_STEP = 256


@dataclass
class Pass:
    """One forward and backward."""

    program: Program | None
    """What led to its loss; None where that is not known."""
    modules: list[torch.nn.Module]
    """The outermost modules that were called."""
    called: Site | None
    """Where the first of them was called."""
    backward: Site | None = None
    """Where backward was."""
    source: SourceLoss | None = None
    """What the script's lines would have made of the result, where memory ran out before."""
    place: int = 0
    """When it ended, as a place in the recorder's events."""


@dataclass
class Findings:
    """What was seen of a script."""

    passes: list[Pass] = field(default_factory=list)
    """Of the last step, complete ones."""
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    """Those that stepped."""
    steps: int = 0
    clip_norm: float | None = None
    open_pass: Pass | None = None
    """One that memory ran out in."""


class StepWatch:
    """Watches a script for its first two steps; the second one has the optimizer's state from its begin.

    Args:
        when_seen: called at the end of the second step, inside the optimizer's call.
    """

    def __init__(self, when_seen: Callable[[], None]) -> None:
        self.recorder: MemoryRecorder | None = None
        self.findings = Findings()
        self._when_seen = when_seen
        self._program = ProgramRecorder()
        self._thread = threading.get_ident()
        self._is_open = True
        self._depth = 0
        self._in_backward = False
        self._first_optimizer: torch.optim.Optimizer | None = None
        self._pass: Pass | None = None
        self._step_is_over = self._is_stepping = False
        self._undo: list[Callable[[], object]] = []

    # ------------------------------------------------------------------------------------------------ on and off

    def install(self) -> None:
        """Begin to watch."""
        call, backward = torch.nn.Module.__call__, torch.autograd.backward
        watch = self

        @functools.wraps(call)
        def watched_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not watch._is_open or threading.get_ident() != watch._thread:
                return call(module, *args, **kwargs)
            return watch._call_module(call, module, args, kwargs)

        @functools.wraps(backward)
        def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if not watch._is_open or watch.recorder is None or watch._in_backward:
                return backward(tensors, *args, **kwargs)
            return watch._run_backward(backward, tensors, args, kwargs)

        self._replace(torch.nn.Module, "__call__", watched_call)
        self._replace(torch.autograd, "backward", watched_backward)
        clip = torch.nn.utils.clip_grad_norm_

        @functools.wraps(clip)
        def watched_clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            watch.findings.clip_norm = float(max_norm)
            return clip(parameters, max_norm, *args, **kwargs)

        self._replace(torch.nn.utils, "clip_grad_norm_", watched_clip)
        self._replace(torch.nn.utils.clip_grad, "clip_grad_norm_", watched_clip)
        for hook in (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            self._undo.append(hook.remove)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._pause)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        own = vars(owner)[name]
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, own))

    def remove(self) -> None:
        """End watching."""
        self._is_open = self._program.is_open = False
        while self._undo:
            self._undo.pop()()
        if self.recorder is not None:
            if top_function_mode() is self._program:
                self._program.deactivate()
            self.recorder.stop()

    def _pause(self) -> None:
        """Watch nothing in a process that the script forks."""
        self._is_open = self._program.is_open = False
        if self.recorder is not None:
            self.recorder.pause()

    # ------------------------------------------------------------------------------------------------ modules

    def _call_module(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.recorder is None:
            if not _begins_training(module):
                return call(module, *args, **kwargs)
            self._begin(module)
        assert self.recorder is not None
        outermost = self._depth == 0 and not self._in_backward and _has_parameters(module)
        if outermost and self._pass is None:
            self._begin_pass()
            self._pass = Pass(program=None, modules=[], called=current_site())
            self._program.named = self._pass.called.tensors if self._pass.called is not None else {}
        if outermost and self._pass is not None and not any(module is one for one in self._pass.modules):
            self._pass.modules.append(module)
        if outermost:
            for tensor in batch_tensors((args, kwargs)):
                self.recorder.label_batch(tensor)
        was_open, self._program.is_open = self._program.is_open, self._program.is_open and not outermost
        self._depth += outermost or self._depth > 0
        self.recorder.enter(module)
        try:
            result = call(module, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if outermost and is_out_of_memory(error) and self._is_open:
                self._program.note(module, args, kwargs, None)
                if self._pass is not None:
                    self._pass.source = source_loss(script_frame(), self._pass.called)
                self._note_failure(self._program.begun())
            raise
        finally:
            self._depth -= self._depth > 0
            if self._is_open:
                self.recorder.exit()
                self._program.is_open = was_open
        if outermost:
            self._program.note(module, args, kwargs, result)
        return result

    def _begin_pass(self) -> None:
        """Let go of what the pass before was called with; after an optimizer's step, of the step before.

        It may run inside an optimizer's step, as a closure.
        """
        assert self.recorder is not None
        self.recorder.in_optimizer = False
        self._program.is_open = True
        if self._step_is_over:
            self._step_is_over = False
            self._program.forget()
            self.findings.passes.clear()
        for earlier in self.findings.passes:
            if earlier.program is not None:
                earlier.program.let_go()

    def _begin(self, module: torch.nn.Module) -> None:
        """Begin to record, with the first module that is called to be trained."""
        self.recorder = MemoryRecorder(device_for(module))
        self.recorder.when_failed = self._note_failure_outside
        self.recorder.start()
        self._program.activate()
        self._program.is_open = True

    # ------------------------------------------------------------------------------------------------ backward

    def _run_backward(
        self, backward: Callable[..., None], tensors: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert self.recorder is not None
        roots = tensors_of(tensors)
        current = self._pass or Pass(program=None, modules=[], called=None)
        plain = len(roots) == 1 and roots[0].numel() == 1
        current.program = self._program.leading_to(roots[0]) if plain else None
        if current.program is not None and (self.findings.steps or self._first_optimizer is None):
            current.program.hold()
        current.backward = current_site()
        for tensor in () if current.program is None else current.program.given:
            self.recorder.label_batch(tensor)
        was_open, self._program.is_open = self._program.is_open, False
        self._in_backward = True
        self.recorder.begin_backward()
        self._pass = current
        self._label_gradients()
        try:
            backward(tensors, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self._note_failure(current.program)
            raise
        finally:
            self._in_backward = False
            if self._is_open:
                self.recorder.end_backward()
                self._label_gradients()
                self._program.is_open = was_open
                self._program.end_pass()
                self.recorder.in_optimizer = self._is_stepping
        current.place = self.recorder.place
        self.findings.passes.append(current)
        self._pass = None
        if self._first_optimizer is None:
            self._stop_without_optimizer()

    def _stop_without_optimizer(self) -> None:
        """Stop a training that steps by other means, or never."""
        passes = len(self.findings.passes)
        if passes >= _MOST_PASSES_OF_A_STEP or (passes >= _MOST_PASSES and not optimizers_of(self._parameters())):
            self._when_seen()

    def _parameters(self) -> list[torch.nn.Parameter]:
        current = [] if self._pass is None else [self._pass]
        modules = [module for one in (*self.findings.passes, *current) for module in one.modules]
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    def _label_gradients(self) -> None:
        assert self.recorder is not None
        owners = {id(p): m for one in self._all_modules() for m in one.modules() for p in m.parameters(recurse=False)}
        for parameter in self._parameters():
            if parameter.grad is not None:
                self.recorder.label(parameter.grad, "gradients", owners.get(id(parameter), "<other>"))

    def _all_modules(self) -> list[torch.nn.Module]:
        current = [] if self._pass is None else [self._pass]
        return [module for one in (*self.findings.passes, *current) for module in one.modules]

    def _note_failure_outside(self) -> None:
        """Note that memory ran out between the model's call and backward, in the script's own code."""
        if self._depth == 0 and not self._in_backward and not self._is_stepping and self._pass is not None:
            self._pass.source = source_loss(script_frame(), self._pass.called)
            self._note_failure(self._program.begun())

    def _note_failure(self, program: Program | None) -> None:
        """Note that memory ran out, which the script may know how to go on from."""
        if self._is_open and self._pass is not None:
            self._label_gradients()
            if program is not None:
                program.hold()
                self._pass.program = program
            self.findings.open_pass, self._pass = self._pass, None

    # ------------------------------------------------------------------------------------------------ optimizers

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_open and self.recorder is not None:
            self._is_stepping = self.recorder.in_optimizer = True
            self._program.is_open = False

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_open or self.recorder is None:
            return
        self._is_stepping = self.recorder.in_optimizer = False
        self._program.is_open = True
        if not any(optimizer is one for one in self.findings.optimizers):
            self.findings.optimizers.append(optimizer)
        if self._first_optimizer is None:
            self._first_optimizer = optimizer
        if optimizer is not self._first_optimizer:
            return
        self.findings.steps += 1
        self.findings.open_pass = None  # whatever ran out of memory before, the script went on from
        self.recorder.forget_failure()
        if self.findings.steps == 2:
            self._when_seen()
            return
        self._step_is_over = True


def _begins_training(module: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and module.training and _has_parameters(module)


def _has_parameters(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def optimizers_of(parameters: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return the optimizers that there are of any of the parameters, whether or not they have stepped."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.optim.Optimizer)
        and any(id(p) in wanted for group in thing.param_groups for p in group["params"])
    ]
