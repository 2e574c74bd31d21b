"""Entry point: parse, run a command, turn errors into exit codes.

0 done; 1 failed while running; 2 bad input; 128 + n ended by signal n.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from tightfit import __version__
from tightfit.cli import commands, described, grow
from tightfit.cli.completion import PRINT_COMPLETION, SHELLS, completion_script
from tightfit.cli.console import prefix_messages, print_message
from tightfit.cli.flags import Command, Parser, normalise, refuse_unknown_flags
from tightfit.cli.options import (
    ExplainOptions,
    FrontierOptions,
    GrowOptions,
    ListOptions,
    PlanOptions,
    ReportOptions,
    TrainOptions,
    VerifyOptions,
)
from tightfit.cli.setting import settings_of
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.process_group import RankFailed
from tightfit.errors import BudgetInfeasible, PlanMismatch, TightfitError, UnsupportedInput, remedy_for
from tightfit.explanation.script import ScriptFailed
from tightfit.report.lasting_stream import discard
from tightfit.train import Interrupted
from tightfit.train.launch.launcher import ProcessFailed
from tightfit.train.launch.rendezvous import was_in_a_group
from tightfit.train.registry import did_you_mean
from tightfit.train.signals import ending_signals

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

_OUT_OF_MEMORY = (
    "the device had no more memory ({what}), although every measured peak was within the budget, so something else "
    "takes memory there, or the process may have less than the budget (a container's limit, ulimit). Give a smaller "
    "--memory, or free memory on the device; a training run goes on with --resume auto."
)

#: What a path may be that a user has given, or another program has left.
_OF_PATHS = {
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.EEXIST, errno.ENXIO, errno.ENODEV,
}  # fmt: skip
#: What a disk may be.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EPIPE}
_SHOWN = 200

COMMANDS: dict[str, tuple[Command[Any], Callable[[Any, Sequence[str]], int]]] = {
    command.name: (command, function)
    for command, function in (
        (
            Command(
                name="train",
                summary="train a model inside a memory budget",
                options=TrainOptions,
                bare={"grad_checkpoint": "auto", "resume": "auto"},
            ),
            commands.train,
        ),
        (
            Command(
                name="plan",
                summary="plan a budget without training: what is recomputed, and the cost",
                options=PlanOptions,
            ),
            commands.plan,
        ),
        (
            Command(name="frontier", summary="show the time that each budget costs", options=FrontierOptions),
            commands.frontier,
        ),
        (
            Command(name="grow", summary="find the largest batch that fits a budget", options=GrowOptions),
            grow.grow,
        ),
        (
            Command(
                name="verify", summary="prove that planned steps equal plain ones, bit for bit", options=VerifyOptions
            ),
            commands.verify,
        ),
        (
            Command(
                name="explain",
                summary="say why an unchanged training script needs the memory it needs, and what would help",
                options=ExplainOptions,
                alone="script",
                passed_on="arguments",
            ),
            commands.explain,
        ),
        (
            Command(name="report", summary="show a run as one HTML page", options=ReportOptions, alone="run_folder"),
            commands.report,
        ),
        (Command(name="models", summary="list the built-in models", options=ListOptions), commands.models),
        (Command(name="datasets", summary="list the built-in datasets", options=ListOptions), commands.datasets),
        (
            Command(name="devices", summary="list GPUs that plans can be made for unseen", options=ListOptions),
            described.devices,
        ),
        (
            Command(name="doctor", summary="check this machine, and test the engine", options=ListOptions),
            commands.doctor,
        ),
    )
}


#: For another process of the run to print its error.
_OTHERS_ERROR_S = 2.0
#: From a signal that a finalizer has swallowed to its second coming.
_AGAIN_S = 0.05


def console() -> NoReturn:
    """Run the `tightfit` program."""
    _take_standard_descriptors()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    exit_code = _flushed(main(sys.argv[1:], afterwards=_end_at_once))
    if was_in_a_group():
        # Threads of the process group may outlive it, and abort the process when they ask for Python's lock while that
        # is coming to its end: the end is left out.
        logging.shutdown()
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _take_standard_descriptors() -> None:
    """Open what the process was begun without: else the next file has its number, and libraries print into that."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # libraries print without looking
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # stays open


def _flushed(exit_code: int) -> int:
    """Have all that was printed written before the interpreter's end, which would only say that it cannot be."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        discard(sys.stdout)
        if problem.errno != errno.EPIPE:  # a reader that has read enough is none
            return _print_error(_unwritten(problem), exit_code or EXIT_FAILED)
    return exit_code


def _unwritten(problem: OSError) -> str:
    """Say that something could not be written; where no file is named, it is what was printed."""
    where = f" to {problem.filename!r}" if problem.filename else ""
    return (
        f"nothing more could be written{where} ({problem.strerror}). {remedy_for(str(problem))}; a training run goes "
        f"on with --resume auto."
    )


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End as by the signal, but with an exit code: all that is left to do is to say why it ended."""
    os._exit(128 + number)


def main(arguments: Sequence[str], afterwards: Callable[[int, FrameType | None], NoReturn] | None = None) -> int:
    """Run the command line ``arguments`` and return the exit code.

    `afterwards` handles signals that end runs from then on; else they are handled as before.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    ending = [number for number in ending_signals() if number != signal.SIGINT] if in_main_thread else []
    previous = {number: signal.signal(number, _terminate) for number in ending}
    try:
        try:
            with _raising_again():
                return _run(arguments)
        finally:  # what follows is short; a signal may end it
            for number, handler in previous.items():
                signal.signal(number, afterwards or handler)
    except RankFailed as problem:
        time.sleep(_OTHERS_ERROR_S)  # a launcher that saw this process end first would kill the other before it prints
        return EXIT_BAD_INPUT if problem.is_bad_input else EXIT_FAILED
    except (BudgetInfeasible, PlanMismatch, UnsupportedInput) as problem:
        return _print_error(problem, EXIT_BAD_INPUT)
    except (ProcessFailed, ScriptFailed) as problem:
        return _print_error(problem, problem.exit_code)
    except TightfitError as problem:
        return _print_error(problem, EXIT_FAILED)
    except Interrupted as interrupted:
        return _print_error(interrupted, interrupted.exit_code)
    except _Terminated as ended:
        return _print_error(f"ended by {ended.number.name}", 128 + ended.number)
    except KeyboardInterrupt:
        return _print_error("interrupted", 128 + signal.SIGINT)
    except UnicodeEncodeError as problem:
        return _print_error(
            f"{problem.object[problem.start : problem.end]!a} is no character, so the text around it cannot be "
            f"written. Check the command line and the files that it names.",
            EXIT_BAD_INPUT,
        )
    except OSError as problem:
        if problem.errno in _OF_PATHS and isinstance(problem.filename, str):
            shown = problem.filename if len(problem.filename) <= _SHOWN else f"{problem.filename[:_SHOWN]}..."
            return _print_error(
                f"{shown!r} cannot be used: {problem.strerror}. Check the paths on the command line.",
                EXIT_BAD_INPUT,
            )
        if problem.errno in _OF_DISKS:
            return _print_error(_unwritten(problem), EXIT_FAILED)
        return _unexpected(problem, arguments)
    except Exception as problem:
        if is_out_of_memory(problem):
            return _print_error(_OUT_OF_MEMORY.format(what=f"{type(problem).__name__}: {problem}"), EXIT_FAILED)
        return _unexpected(problem, arguments)
    finally:
        prefix_messages("")


def _unexpected(problem: Exception, arguments: Sequence[str]) -> int:
    """Print an error that nobody has foreseen, with all that helps to find its cause."""
    traceback.print_exception(problem)
    what = f"{type(problem).__name__}: {problem}"
    return _print_error(f"failed while running `tightfit {shlex.join(arguments)}`: {what}", EXIT_FAILED)


class _Terminated(BaseException):
    """A signal outside the training loop, which has its own way to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def _raising_again() -> Iterator[None]:
    """Inside, a signal that came in a finalizer, which lets no error out, comes again a moment later."""
    before, is_over = sys.unraisablehook, False

    def send(number: int) -> None:
        if not is_over:
            os.kill(os.getpid(), number)

    def hook(found: Any) -> None:
        if isinstance(found.exc_value, _Terminated):
            threading.Timer(_AGAIN_S, send, [found.exc_value.number]).start()
        else:
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        is_over = True
        sys.unraisablehook = before


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


def _print_error(problem: object, exit_code: int) -> int:
    print_message(problem)
    return exit_code


def _parser(called: str | None, *, all_flags: bool) -> Parser:
    """Return the parser, with the flags of the command that is called, or of all."""
    parser = Parser(prog="tightfit", description="Train any PyTorch model inside the memory you have.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument(PRINT_COMPLETION, metavar="SHELL", help=f"print what completes words in: {', '.join(SHELLS)}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command, _ in COMMANDS.values():
        command.add_to(subparsers, flags=all_flags or command.name == called)
    return parser


def _run(arguments: Sequence[str]) -> int:
    completion = arguments[:1] == [PRINT_COMPLETION]
    parser = _parser(next(iter(arguments), None), all_flags=completion)
    for word in arguments:
        word.encode("utf-8")  # raises where it is not text; it would be written into the run's files
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    if arguments == ["--version"]:
        print(f"tightfit {__version__}")
        return 0
    if completion:
        print(completion_script(parser, arguments[1:]))
        return 0
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        raise UnsupportedInput(
            f"there is no command {arguments[0]!r}.{did_you_mean(arguments[0], COMMANDS)} "
            f"Commands are: {', '.join(COMMANDS)}."
        )
    if arguments[0] not in COMMANDS:
        known = ["--help", "--version", PRINT_COMPLETION]
        refuse_unknown_flags([word for word in arguments if word not in ("-h", "--help")], known)
        parser.print_help()
        return 0
    command, function = COMMANDS[arguments[0]]
    settings = settings_of(command.options)
    bare_flags = {setting.flag: command.bare[setting.name] for setting in settings if setting.name in command.bare}
    own, passed_on = command.split(arguments[1:])
    words = normalise([arguments[0], *own], bare_flags, [setting.name for setting in settings])
    try:
        found, rest = parser.parse_known_args(words)
    except SystemExit as shown:  # --help has been printed
        return int(shown.code or 0)
    refuse_unknown_flags(rest, ["--config-file", *(setting.flag for setting in settings)])
    return function(command.parse(found, rest, passed_on), ["tightfit", *arguments])
