"""``--deterministic``: the same bits every time, or an error that names the operation that cannot give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tightfit.device.process_state import deterministic_libraries


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Make PyTorch use deterministic operations only inside the context; afterwards its settings are as they were."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic_libraries():
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
