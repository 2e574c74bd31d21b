"""Shared by all tests: one thread, a quiet profiler, a fixed seed."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch.profiler's library reads it when torch is imported
