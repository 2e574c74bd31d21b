"""Hold the model of the caching allocator against PyTorch's own, on the requests of real training steps.

    python -m tests.emulated_cuda.run python -m tests.emulated_cuda.training_traces

PyTorch records what its allocator is asked for and when it asks the driver for memory.  The model gets the same
requests, and must have reserved the same bytes after each.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tightfit._torch_private.libraries import cuda_allocator_settings
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemory

STEPS = 4


@dataclass(frozen=True)
class Found:
    """What a training's requests showed; without a difference both allocators had reserved the same after each."""

    name: str
    requests: int
    segments: int
    retries: int
    ran_out: bool
    peak_reserved_bytes: int
    difference: str


@dataclass(frozen=True)
class Training:
    """How to train; everything that changes what the allocator is asked for."""

    name: str
    model: str
    autocast: bool = False
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW
    set_to_none: bool = True
    lengths: tuple[int, ...] = (512,)
    accumulation: int = 1
    clips: bool = False
    cap_share: float = 0.0
    """Share of its reserved peak that the process is capped at; 0: no cap."""


def foreach(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def one_by_one(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, foreach=False)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


VARYING = (512, 300, 701, 512)
TRAININGS = (
    Training("fp32, AdamW foreach", "transformer", optimizer=foreach),
    Training("fp32, AdamW fused", "transformer", optimizer=fused),
    Training("fp32, AdamW foreach, gradients kept", "transformer", optimizer=foreach, set_to_none=False),
    Training("fp32, AdamW fused, gradients kept", "transformer", optimizer=fused, set_to_none=False),
    Training("fp32, Adam one by one, clipped", "transformer", optimizer=one_by_one, clips=True),
    Training("fp32, varying lengths", "transformer", lengths=VARYING),
    Training("bf16, AdamW foreach", "transformer", autocast=True, optimizer=foreach),
    Training("bf16, AdamW fused", "transformer", autocast=True, optimizer=fused),
    Training("bf16, gradients kept, clipped", "transformer", autocast=True, set_to_none=False, clips=True),
    Training("bf16, varying lengths", "transformer", autocast=True, lengths=VARYING),
    Training("bf16, three passes for a step", "transformer", autocast=True, accumulation=3),
    Training("fp32, checkpointed", "checkpointed"),
    Training("bf16, checkpointed, varying lengths", "checkpointed", autocast=True, lengths=VARYING),
    Training("fp32, convolutions, SGD", "convolutions", optimizer=momentum),
    Training("bf16, convolutions, varying sizes", "convolutions", autocast=True, lengths=(512, 384, 640)),
    Training("fp32, capped", "transformer", lengths=VARYING, cap_share=0.96),
    Training("bf16, capped", "transformer", autocast=True, lengths=VARYING, cap_share=0.97),
    Training("fp32, capped too low", "transformer", lengths=VARYING, cap_share=0.6),
)


class Transformer(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 768)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.1, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(768, 5000)
        self.checkpointed = checkpointed

    def forward(self, length: int) -> Tensor:
        tokens = torch.zeros(8, length, dtype=torch.long, device="cuda")
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.flatten())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                for a, b in pairwise(widths)
            )
        )
        self.head = nn.Linear(256, 100)

    def forward(self, size: int) -> Tensor:
        images = torch.randn(16, 3, size, size, device="cuda")
        return self.head(self.blocks(images).mean((2, 3))).float().logsumexp(1).mean()


def train(training: Training) -> None:
    """Make the model and take the steps; the first ones differ from the later ones, as everywhere."""
    model: nn.Module = (
        Convolutions() if training.model == "convolutions" else Transformer(training.model != "transformer")
    )
    model = model.to("cuda")
    optimizer = training.optimizer(model.parameters())
    for step in range(STEPS):
        length = training.lengths[step % len(training.lengths)]
        for _ in range(training.accumulation):
            with torch.autocast("cuda", torch.bfloat16, enabled=training.autocast):
                loss = model(length)
            loss.backward()
        if training.clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=training.set_to_none)


class Followed:
    """PyTorch's allocator and the model of it, which gets the requests of the whole process: where a growing segment
    begins is nowhere to be read once its first pages are given back.
    """

    def __init__(self) -> None:
        torch.cuda.init()
        assert torch.cuda.memory_reserved() == 0
        self.available_bytes, self.capacity_bytes = torch.cuda.mem_get_info()
        self.model = CachingAllocator(
            AllocatorSettings.parse(cuda_allocator_settings()),
            available_bytes=self.available_bytes,
            capacity_bytes=self.capacity_bytes,
        )
        self._addresses: dict[int, int] = {}  # the model's, by PyTorch's

    def compare(self, training: Training) -> Found:
        """Train, and give the model of the allocator the same requests."""
        if not training.cap_share:
            return self._train(training)
        uncapped = self._train(training)
        fraction = training.cap_share * uncapped.peak_reserved_bytes / self.capacity_bytes
        self.model.cap_bytes = int(fraction * self.capacity_bytes)
        found = self._train(training, fraction)
        self.model.cap_bytes = None
        return found

    def _train(self, training: Training, fraction: float = 1.0) -> Found:
        self._empty()
        model, reserved_bytes = self.model, torch.cuda.memory_reserved()
        assert (model.reserved_bytes, model.allocated_bytes) == (reserved_bytes, torch.cuda.memory_allocated())
        model.reset_peaks()
        retries = model.retries
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        ran_out = False
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, context=None)
        try:
            torch.cuda.set_per_process_memory_fraction(fraction)
            train(training)
        except torch.OutOfMemoryError:
            ran_out = True
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            gc.collect()
            entries = torch.cuda.memory._snapshot()["device_traces"][0]
            stats = torch.cuda.memory_stats()
            torch.cuda.memory._record_memory_history(enabled=None)
        difference = self._first_difference(entries, reserved_bytes)
        totals = {
            "allocated": (model.allocated_bytes, stats["allocated_bytes.all.current"]),
            "peak allocated": (model.peak_allocated_bytes, stats["allocated_bytes.all.peak"]),
            "reserved": (model.reserved_bytes, stats["reserved_bytes.all.current"]),
            "peak reserved": (model.peak_reserved_bytes, stats["reserved_bytes.all.peak"]),
            "retries": (model.retries - retries, stats["num_alloc_retries"]),
        }
        for name, (predicted, real) in totals.items():
            if predicted != real and not difference:
                difference = f"{name}: PyTorch {real}, model {predicted}"
        return Found(
            name=training.name,
            requests=sum(entry["action"] == "alloc" for entry in entries),
            segments=sum(entry["action"] in ("segment_alloc", "segment_map") for entry in entries),
            retries=stats["num_alloc_retries"],
            ran_out=ran_out,
            peak_reserved_bytes=stats["reserved_bytes.all.peak"],
            difference=difference,
        )

    def _empty(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.model.empty_cache()

    def _first_difference(self, entries: list[dict[str, Any]], reserved_bytes: int) -> str:
        """Return where the model has reserved other bytes than PyTorch; "" if nowhere."""
        model, found = self.model, ""
        for place, entry in enumerate(entries):
            kind, address, nbytes = entry["action"], entry.get("addr", 0), entry["size"]
            if kind in ("segment_alloc", "segment_map"):
                reserved_bytes += nbytes
            elif kind in ("segment_free", "segment_unmap"):
                reserved_bytes -= nbytes
            elif kind == "free_completed":
                model.free(self._addresses.pop(address))
            elif kind in ("alloc", "oom"):
                try:
                    made = model.allocate(nbytes, entry["stream"])
                except OutOfDeviceMemory:
                    if kind == "alloc":
                        return f"entry {place}: the model ran out of memory"
                else:
                    if kind == "oom":
                        return f"entry {place}: PyTorch ran out of memory, the model did not"
                    self._addresses[address] = made
                if model.reserved_bytes != reserved_bytes and not found:
                    found = f"entry {place}, {nbytes} bytes: PyTorch {reserved_bytes}, model {model.reserved_bytes}"
        return found


def main() -> None:
    followed = Followed()
    found = [followed.compare(training) for training in TRAININGS]
    if "--json" in sys.argv:
        print(json.dumps([asdict(one) for one in found]))
    else:
        for one in found:
            outcome = f"{one.retries:2} flushes{', ran out' if one.ran_out else ''}"
            print(
                f"{one.name:40} {one.requests:6} requests {one.segments:4} segments {outcome:19} "
                f"{one.peak_reserved_bytes / 2**20:8.0f} MiB  {one.difference or 'equal'}"
            )
    sys.exit(any(one.difference for one in found))


if __name__ == "__main__":
    main()
