"""Building a model from a description that may say anything: it ends, and says in between how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tightfit.errors import UnsupportedInput

_log = logging.getLogger(__name__)
#: Modules and parameters. Of the largest models of today, whose experts are modules of their own, there are 200,000.
MOST_PARTS = 500_000
_SAY_EVERY_S = 20.0


@contextmanager
def building(what: str) -> Iterator[None]:
    """Count the modules and parameters that are made inside: for a mistyped number of layers that would never end.

    Raises:
        UnsupportedInput: there are more than any model has.
    """
    count, said = 0, time.monotonic()

    def registered(module: nn.Module, name: str, part: nn.Module | nn.Parameter | None) -> None:
        nonlocal count, said
        count += 1
        if count > MOST_PARTS:
            raise UnsupportedInput(
                f"{what} describes a model of more than {MOST_PARTS:,} modules and parameters, and it is not built any "
                f"further: a number of layers or experts must be wrong. Check the description, and --model-args."
            )
        if not count % 1000 and time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            _log.warning(
                "still building the model that %s describes: %s modules and parameters so far", what, f"{count:,}"
            )

    handles = [
        register_module_module_registration_hook(registered),
        register_module_parameter_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
