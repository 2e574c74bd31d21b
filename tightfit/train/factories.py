"""``package.module:factory``: importing and calling a user's own function that makes a model or a dataset."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tightfit.errors import UnsupportedInput
from tightfit.train.registry import did_you_mean


def call_factory(
    factory: Callable[..., Any], arguments: Mapping[str, object], *, what: str, arguments_flag: str
) -> Any:
    """Call ``factory(**arguments)``.

    Errors raised inside the factory pass through unchanged: they are the user's own, with the user's traceback.

    Raises:
        UnsupportedInput: the arguments do not fit; ``what`` and ``arguments_flag`` are named in the message.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # builtins without a signature: the call itself will tell
        return factory(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as problem:
        unknown = [name for name in arguments if name not in signature.parameters]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        raise UnsupportedInput(
            f"{what} cannot be called with the given arguments: {problem}.{hint} "
            f"It takes {signature}. Set them with {arguments_flag} key=value."
        ) from None
    return factory(**arguments)


def import_factory(spec: str, *, flag: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names.

    Raises:
        UnsupportedInput: no such module or function; ``flag`` is named in the message.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UnsupportedInput(
            f"{flag} {spec!r} names no function: both sides of the colon are needed. "
            f"Write package.module:factory, e.g. {flag} mypackage.models:build."
        )
    # As with `python -m`: modules in the working folder can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and not (module_name + ".").startswith(problem.name + "."):
            raise  # the module exists, but lacks something that it imports
        raise UnsupportedInput(
            f"{flag} {spec!r}: there is no module {problem.name!r} among the installed packages or in the working "
            f"folder. Install it, or run from the folder that holds it."
        ) from None
    factory = getattr(module, attribute, None)
    if factory is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UnsupportedInput(
            f"{flag} {spec!r}: module {module_name!r} has no {attribute!r}.{did_you_mean(attribute, public)} "
            f"Name a function of that module."
        )
    if not callable(factory):
        raise UnsupportedInput(
            f"{flag} {spec!r} is of type {type(factory).__name__}, which cannot be called. "
            f"Name a function that returns a model or a dataset."
        )
    found: Callable[..., Any] = factory
    return found
