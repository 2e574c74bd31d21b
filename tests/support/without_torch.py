"""A pytest plugin (``-p tests.support.without_torch``): as if PyTorch were not installed."""

from __future__ import annotations

import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way of saying that there is no such module
