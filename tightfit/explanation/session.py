"""Run a script until its first complete step, in a process of its own: ``python -m tightfit.explanation.session``.

The script runs as ``python script.py`` would run it, in this process's ``__main__``.  Once its step has been seen the
process ends without going back to it, so that nothing is saved or uploaded of a training that did not take place.  What
was found is written as JSON to the file that the command line names.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tightfit.device.described.cards import Card, card_for
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.errors import UnsupportedInput, first_line
from tightfit.explanation.seen_step import explain_findings
from tightfit.explanation.watch import StepWatch
from tightfit.solver.highs import load_solver
from tightfit.step.batch import batch_tensors

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Session:
    """One run of a script.

    Args:
        script: its path.
        found_in: where to write what was found.
        memory: what there is for a step, as a budget, or ``auto``.
        card: a GPU that is not here, which the step may be to run on.
    """

    def __init__(self, script: Path, found_in: Path, memory: str, card: Card | None = None) -> None:
        self._script = script
        self._found_in = found_in
        self._memory = memory
        self._card = card
        self._watch = StepWatch(self._seen)
        self._main = types.ModuleType("__main__")

    def run(self, arguments: Sequence[str]) -> NoReturn:
        """Run the script, explain its step, and end the process."""
        code = self._compiled()
        load_solver()  # a library, for which there may be no memory later
        self._main.__dict__.update(__file__=str(self._script), __builtins__=__builtins__)
        sys.modules["__main__"] = self._main
        sys.argv = [str(self._script), *arguments]
        sys.path[0] = str(self._script.resolve().parent)
        self._watch.install()
        failure: BaseException | None = None
        try:
            exec(code, self._main.__dict__)
        except BaseException as error:
            failure = error
        self._after(failure)

    def _compiled(self) -> types.CodeType:
        try:
            return compile(self._script.read_bytes(), str(self._script), "exec")
        except (SyntaxError, ValueError) as problem:
            self._refuse(
                f"{self._script} is not a Python script ({first_line(problem)}), so there is nothing to run. "
                f"Name the file that `python` runs to train.",
                EXIT_BAD_INPUT,
            )

    # ------------------------------------------------------------------------------------------------ the ends

    def _seen(self) -> None:
        """Explain a step that is complete; the script waits in its optimizer, and never goes on."""
        self._watch.remove()
        self._explain("", 0)

    def _after(self, failure: BaseException | None) -> NoReturn:
        """End after the script has ended by itself."""
        exit_code, told = self._exit_code(failure)
        ran_out = is_out_of_memory(failure)
        watch = self._watch
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)
            failure.__traceback__ = failure.__context__ = failure.__cause__ = None
        self._drop_graphs()
        gc.collect()
        watch.remove()
        findings = watch.findings
        if watch.recorder is not None and (findings.open_pass is not None or findings.passes):
            self._explain(told if ran_out or findings.open_pass is not None else "", exit_code)
        if ran_out:
            self._refuse(
                f"{self._script} ran out of memory before its first training step ({told}), so there is no step to "
                f"explain. Build a smaller model or load less data, or give the process more memory.",
                exit_code,
            )
        if exit_code:
            self._refuse(
                f"{self._script} ended before its first training step ({told}), so there is no step to explain. "
                f"Run it with `python` until it trains, then explain it.",
                exit_code,
            )
        self._refuse(
            f"{self._script} ended without a training step: no module was called in training mode with gradients and "
            f"followed by backward in this process, so there is nothing to explain. Name the script that trains, with "
            f"the arguments with which it does (a launcher's workers are not seen).",
            EXIT_BAD_INPUT,
        )

    def _exit_code(self, failure: BaseException | None) -> tuple[int, str]:
        """Return the exit code that Python would end with, and why, in words; print what Python would print."""
        if failure is None:
            return 0, ""
        if isinstance(failure, SystemExit):
            code = failure.code
            if code is None or isinstance(code, int):
                return (code or 0) & 0xFF, f"it exited with code {code or 0}"
            print(code, file=sys.stderr)
            return EXIT_FAILED, f"it exited with {str(code).splitlines()[0]!r}" if str(code) else "it exited"
        self._print_own_traceback(failure)
        told = f"{type(failure).__name__}: {first_line(failure)}"
        return (EXIT_INTERRUPTED if isinstance(failure, KeyboardInterrupt) else EXIT_FAILED), told

    def _print_own_traceback(self, failure: BaseException) -> None:
        """Print the traceback without our frames, which called the script or stood in for PyTorch's functions."""
        shown = traceback.TracebackException.from_exception(failure)
        package = str(Path(__file__).parent)
        shown.stack = traceback.StackSummary.from_list(
            [frame for frame in shown.stack if not frame.filename.startswith(package)]
        )
        print("".join(shown.format()), end="", file=sys.stderr)

    def _drop_graphs(self) -> None:
        """Let go of the graphs that the script's global variables hold."""
        variables = self._main.__dict__
        for name in [name for name, value in variables.items() if _holds_graph(value)]:
            del variables[name]

    # ------------------------------------------------------------------------------------------------ telling

    def _explain(self, failure: str, exit_code: int) -> NoReturn:
        seen = "memory has run out" if failure else "the step was seen; the script ends here"
        print(f"tightfit: {seen}, and the step is planned", file=sys.stderr, flush=True)
        try:
            found = explain_findings(self._watch, failure=failure, memory=self._memory, card=self._card)
            document = {"explanation": found.to_json(), "text": str(found), "exit_code": exit_code}
        except UnsupportedInput as problem:
            self._refuse(str(problem), EXIT_BAD_INPUT)
        except Exception as problem:
            if not is_out_of_memory(problem):
                traceback.print_exception(problem)
            self._refuse(
                f"the step of {self._script} was seen, but it cannot be explained ({first_line(problem)}). If memory "
                f"is short, give this process more than the script has; else please report it.",
                EXIT_FAILED,
            )
        self._end(document)

    def _refuse(self, message: str, exit_code: int) -> NoReturn:
        self._end({"problem": message, "exit_code": exit_code})

    def _end(self, document: dict[str, Any]) -> NoReturn:
        self._found_in.write_text(json.dumps(document), encoding="utf-8")
        for child in multiprocessing.active_children():  # workers that load data
            child.terminate()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # the script has closed it
                continue
        os._exit(int(document["exit_code"]))


def _holds_graph(value: Any) -> bool:
    if isinstance(value, torch.Tensor | dict | list | tuple):
        return any(tensor.grad_fn is not None for tensor in batch_tensors(value))
    return type(value).__name__.endswith("Output") and any(t.grad_fn is not None for t in batch_tensors(value))


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the script that the command line names: FOUND_IN MEMORY CARD SCRIPT ARGS..., where CARD may be empty."""
    found_in, memory, card, script, *rest = arguments
    Session(Path(script), Path(found_in).absolute(), memory, card_for(card) if card else None).run(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
