"""Batches that gave no finite numbers, kept in the run's folder for people to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from tightfit.errors import UnsupportedInput
from tightfit.step.microbatch import Microbatch
from tightfit.train.files import replacing, write_text
from tightfit.train.plain_state import pack

FOLDER = "nonfinite"
#: Where steps are skipped, there may be many.
_MOST = 20


def keep_batch(
    run: Path, step: int, rank: int, samples: Sequence[int], found: str, microbatches: Sequence[Microbatch]
) -> str | None:
    """Write a process's part of a batch to ``nonfinite/step-….safetensors`` and ``.json`` in the folder of the run.

    Returns the path; None where it could not be written, or enough are kept already.
    """
    folder = run / FOLDER
    path = folder / f"step-{step:08d}-rank-{rank}.safetensors"
    try:
        if (
            not run.is_dir()
            or folder.is_symlink()
            or (folder.is_dir() and len(list(folder.glob("*.safetensors"))) >= _MOST)
        ):
            return None
        folder.mkdir(exist_ok=True)
        tensors, plain = pack([{"batch": one.batch, "weight": one.weight} for one in microbatches])
        with replacing(path) as temporary:
            save_file(tensors, temporary)
        described = {"step": step, "rank": rank, "found": found, "samples": list(samples), "microbatches": plain}
        write_text(path.with_suffix(".json"), json.dumps(described, allow_nan=False) + "\n")
    except (OSError, SafetensorError, UnsupportedInput):
        return None
    return str(path)
