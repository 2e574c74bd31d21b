"""A model whose checkpoints are written late, by threads, or, where SAVES says so, while its steps wait."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from tests.support.late_writes import written_late
from tests.train.attacks import subject
from tightfit.train.checkpoint import Draft
from tightfit.train.checkpoint_writer import CheckpointWriter
from tightfit.train.loop import OptimizerStep


def model() -> nn.Module:
    """Patches what saves, in the process that makes it."""
    if os.environ["SAVES"] == "at-once":
        CheckpointWriter._copies = lambda self, draft: None  # type: ignore[method-assign]  # no memory for a copy
        return subject.model()
    taken, late = written_late(lambda rank, step: Path(f"late-{rank}-{step}").touch())
    OptimizerStep.take = taken  # type: ignore[method-assign]  # in this process only
    Draft.write_tensors = late  # type: ignore[method-assign]  # as above
    return subject.model()
