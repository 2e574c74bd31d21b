"""The measured points: one training on one card each, read from tables of public measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tightfit.simulation.training_loop import Clearing

#: Columns of xmem.csv with what other tools estimated.
OTHER_TOOLS = ("xmem", "dnnmem", "schedtune", "llmem")
#: xMem's modes of zero_grad. Where none is given, its scripts clear at the start.
_CLEARING = {"": Clearing.FIRST, "0": Clearing.FIRST, "1": Clearing.BEFORE_BACKWARD, "2": Clearing.LAST}
_XMEM_CARDS = {"3060": "rtx3060-12gb", "4060": "rtx4060-8gb", "A100": "a100-40gb"}
_AMP_CARD = "rtx3090-24gb"
#: What a process of timm's rows held beside PyTorch's allocator.  CUDA 11.3 loaded all kernels at once: on an RTX 3090
#: 1644 MiB were in use with one tensor of 64 x 16 x 200 x 200 floats (github pytorch/pytorch issue 49877).
_EAGER_CONTEXT_BYTES = (1644 << 20) - 4 * 64 * 16 * 200 * 200


@dataclass(frozen=True)
class Outcome:
    """A run that ended, or ran out of memory."""

    limit_bytes: int | None
    """The cap on reserved bytes; None: the card is the limit."""
    ok: bool


@dataclass(frozen=True)
class Point:
    """A training that somebody ran on a card."""

    table: str
    name: str
    model: str
    card: str
    batch_size: int
    image_size: int | None
    """None: of tokens."""
    optimizer: str
    clearing: Clearing
    half: bool
    iterations: int
    outcomes: tuple[Outcome, ...]
    peak_bytes: int | None = None
    """The most that it held without a cap, the bare context left out; None where that is not known."""
    context_bytes: int | None = None
    """What the process held beside PyTorch's allocator, where that is known; None: as the card says."""
    keeps_batch: bool = True
    """Whether a batch is there until the next one is; see `run_loop`."""
    others: Mapping[str, int] = field(default_factory=dict)
    """What other tools estimated, in bytes."""
    is_allocated: bool = False
    """Whether `peak_bytes` is the most that was allocated, not reserved."""
    row: Mapping[str, str] = field(default_factory=dict)
    """The row itself, of tables of which each model has settings of its own."""
    processes: int = 1
    """Over how many the model is sharded by FSDP2."""
    allocator: str = ""
    """The allocator's options, as in ``PYTORCH_ALLOC_CONF``."""
    no_answer: str = ""
    """Why the benchmark does not build it; empty where it does."""
    is_impossible: bool = False
    """Whether what was measured cannot be: less than what the step has to hold."""

    @property
    def contradicts_itself(self) -> bool:
        """Whether a run failed with as much memory as another one ended with, or what was measured cannot be."""
        if self.is_impossible:
            return True
        enough = [one.limit_bytes for one in self.outcomes if one.ok and one.limit_bytes is not None]
        short = [one.limit_bytes for one in self.outcomes if not one.ok and one.limit_bytes is not None]
        return bool(enough and short) and min(enough) <= max(short)


def xmem_points(name: str, row: Mapping[str, str]) -> Iterator[Point]:
    """Read a row of xmem.csv."""
    outcomes = []
    for text in filter(None, row["cap_outcomes"].split(";")):
        limit, _, outcome = text.partition(":")
        outcomes.append(Outcome(int(limit), outcome == "ok"))
    ran_out = row["real_oom"] == "1"
    if row["real_oom"]:
        outcomes.append(Outcome(None, not ran_out))
    peak = row["nvml_delta_peak_bytes"]
    yield Point(
        table="xmem",
        name=name,
        model=row["model"],
        card=next(card for mark, card in _XMEM_CARDS.items() if mark in row["card"]),
        batch_size=int(row["batch"]),
        image_size=86 if row["family_kind"] == "cnn" else None,
        optimizer=row["optimizer"],
        clearing=_CLEARING[row["zero_grad_mode"]],
        half=False,
        iterations=int(row["iterations"] or 4),
        outcomes=tuple(outcomes),
        peak_bytes=int(peak) if peak and not ran_out else None,
        keeps_batch=False,  # ``inputs, labels = inputs.to(device), labels.to(device)`` in a loop over (inputs, labels)
        others={tool: int(float(row[f"{tool}_bytes"])) for tool in OTHER_TOOLS if row.get(f"{tool}_bytes")},
    )


def timm_points(name: str, row: Mapping[str, str]) -> Iterator[Point]:
    """Read a row of timm_brackets.csv: two points."""
    for column, ok in (("batch_fit", True), ("batch_fail", False)):
        yield Point(
            table="timm",
            name=f"{name} {column}",
            model=row["model"],
            card=_AMP_CARD,
            batch_size=int(row[column]),
            image_size=int(row["img_size"]),
            optimizer="SGD momentum",
            clearing=Clearing.NEVER,
            half=True,
            iterations=3,
            outcomes=(Outcome(None, ok),),
            context_bytes=_EAGER_CONTEXT_BYTES,
        )
