"""A pytest plugin (``-p tests.support.without_extras``): as if no extra were installed."""

from __future__ import annotations

import sys

from tests.support.extras import PACKAGES

for package in PACKAGES:
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way of saying that there is no such module
