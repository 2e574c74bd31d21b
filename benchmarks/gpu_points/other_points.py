"""Points of tables with one peak for each row: litgpt's, SysSim's and torchtitan's own measurements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from benchmarks.gpu_points.points import Outcome, Point
from benchmarks.gpu_points.torchtitan_models import ALLOCATOR
from tightfit.simulation.training_loop import Clearing

_LITGPT_CARD = "a10g-24gb"
_SYSSIM_CARD = "gh200-96gb"
#: torchtitan's H100s have 96 GB, as the H100 of a GH200.
_TORCHTITAN_CARD = "gh200-96gb"
_COMPILED = "compiled: which results are kept then is for the compiler to say, which needs a GPU"


def litgpt_points(name: str, row: Mapping[str, str]) -> Iterator[Point]:
    """Read a row of litgpt.csv."""
    accumulates = row["grad_accumulation_iters"] not in ("", "1")
    peak_bytes = int(row["peak_bytes_approx"])
    # bf16 weights, gradients and two states on one GPU: more than what was measured, so something else was run.
    states_bytes = float(row["states_GB_arithmetic"]) * 1e9 if row["method"] == "full" and row["devices"] == "1" else 0
    yield Point(
        table="litgpt",
        name=name,
        model=f"{row['model'].partition(' (')[0]} {row['method']}",
        card=_LITGPT_CARD,
        batch_size=int(row["micro_batch"]),
        image_size=None,
        optimizer="AdamW",
        clearing=Clearing.NEVER if accumulates else Clearing.LAST,  # later passes find the gradients of earlier ones
        half=False,
        iterations=3,
        outcomes=(),
        peak_bytes=peak_bytes,
        is_allocated=True,
        row=row,
        processes=int(row["devices"].split(" ")[0]),
        is_impossible=states_bytes > peak_bytes,
    )


def others_points(name: str, row: Mapping[str, str]) -> Iterator[Point]:
    """Read a row of others.csv, if it is of a group that is asked for."""
    if row["group"] == "syssim-gh200":
        yield _syssim(name, row)
    elif row["group"] == "torchtitan":
        yield _torchtitan(name, row)


def _syssim(name: str, row: Mapping[str, str]) -> Point:
    ran_out = row["value"] == "OOM"
    return Point(
        table="syssim",
        name=name,
        model=f"{row['model']} {row['parallel']} {row['checkpointing'].removeprefix('recompute ')}",
        card=_SYSSIM_CARD,
        batch_size=int(row["batch"]),
        image_size=None,
        optimizer="Adam",
        clearing=Clearing.NEVER,
        half=False,
        iterations=3,
        outcomes=(Outcome(None, not ran_out),),
        peak_bytes=None if ran_out else int(float(row["value"]) * 1e9),
        is_allocated=True,
        row=row,
    )


def _torchtitan(name: str, row: Mapping[str, str]) -> Point:
    shards = re.fullmatch(r"FSDP ?(\d+)", row["parallel"])
    return Point(
        table="torchtitan",
        name=name,
        model=f"{row['model']} {row['parallel']}",
        card=_TORCHTITAN_CARD,
        batch_size=int(row["batch"]),
        image_size=None,
        optimizer="AdamW",
        clearing=Clearing.FIRST,
        half=False,
        iterations=3,
        outcomes=(),
        peak_bytes=int(float(row["gib"]) * 2**30),
        row=row,
        processes=int(shards[1]) if shards else 1,
        allocator=ALLOCATOR,
        no_answer=_COMPILED if "compile" in row["precision"] else "",
    )
