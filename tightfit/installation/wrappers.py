"""Find what a planned model was wrapped in after it got its plan: PEFT, an autocast wrapper, the user's own module.

A wrapper may change how the model runs (its precision, the weights that train) and is known to nobody but its caller;
but while the model runs, its call is on Python's stack.
"""

from __future__ import annotations

import sys
import types

import torch

from tightfit._torch_private.compiling import is_call_of_compiled
from tightfit._torch_private.modules import CODE_OF_A_CALL, is_compiled
from tightfit.distributed.ddp import unwrapped


def wrapper_that_calls(model: torch.nn.Module) -> tuple[torch.nn.Module | None, bool]:
    """Find through what this thread calls the model.

    Returns:
        The outermost module whose call it is in, DistributedDataParallel taken off; None if that is the model itself or
        what was compiled of it, or does not hold it. And whether something compiled calls the model.
    """
    frame: types.FrameType | None = sys._getframe(1)
    found: torch.nn.Module | None = None
    by_compiled = False
    while frame is not None:
        if frame.f_code is CODE_OF_A_CALL:
            found = frame.f_locals["self"]
        by_compiled = by_compiled or is_call_of_compiled(frame.f_code)
        frame = frame.f_back
    if found is None or is_compiled(found):
        return None, by_compiled
    found = unwrapped(found)
    is_around = found is not model and any(module is model for module in found.modules())
    return found if is_around else None, by_compiled
