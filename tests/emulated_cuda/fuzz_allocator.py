"""Hold the model of the caching allocator against PyTorch's own, on random sequences of requests.

    python -m tests.emulated_cuda.fuzz_allocator --count 5000

After every request, what is allocated and reserved must be the same to the byte, as must be how often the cache was
flushed and where memory ran out.  Each set of options has a process of its own, on an emulated device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.emulated_cuda import counters
from tests.emulated_cuda.build import environment
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemory

KIB, MIB = 2**10, 2**20
DEVICE_GIB = 4

#: Options as in ``PYTORCH_ALLOC_CONF``.
SETTINGS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:20",
    "max_split_size_mb:64,max_non_split_rounding_mb:40",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:[1:2,4:8,16:4,64:1,>:2],garbage_collection_threshold:0.6",
    "garbage_collection_threshold:0.3,max_split_size_mb:40",
    "large_segment_size_mb:32",
    "expandable_segments:True,large_segment_size_mb:14,roundup_power2_divisions:8",
    "expandable_segments:True,max_split_size_mb:32,garbage_collection_threshold:0.5",
    "per_process_memory_fraction:0.1",
)


class Step(NamedTuple):
    """One call: "allocate" so many bytes on a stream, "free" the n-th of what is allocated, "empty", or set a "cap"."""

    kind: str
    number: float = 0
    stream: int = 0


class Counts(NamedTuple):
    allocated_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int
    retries: int
    is_out_of_memory: bool = False


# ---------------------------------------------------------------------------------------------------- sequences


def random_bytes(chance: random.Random) -> int:
    near = chance.choice((512, 64 * KIB, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 32 * MIB, 40 * MIB, 64 * MIB))
    return max(
        1,
        chance.choice((
            chance.randrange(1, 4096),
            chance.randrange(1, MIB),
            chance.randrange(MIB, 10 * MIB),
            chance.randrange(MIB, 10 * MIB),
            chance.randrange(10 * MIB, 200 * MIB),
            near + chance.randrange(-600, 600),
            near,
        )),
    )  # fmt: skip


def random_trace(chance: random.Random) -> list[Step]:
    """Make a sequence of which parts repeat, as training steps do."""
    steps: list[Step] = []
    alive = 0
    if chance.random() < 0.6:
        steps.append(Step("cap", chance.uniform(0.02, 0.3)))
    usual = [random_bytes(chance) for _ in range(chance.randrange(2, 12))]
    streams = chance.choice(([0], [0], [0, 1], [0, 1, 2]))
    for _ in range(chance.randrange(2, 8)):
        for _ in range(chance.randrange(2, 16)):
            nbytes = chance.choice(usual) if chance.random() < 0.7 else random_bytes(chance)
            steps.append(Step("allocate", nbytes, chance.choice(streams)))
            alive += 1
        in_order = chance.choice((True, False))
        for _ in range(chance.randrange(alive + 1)):
            steps.append(Step("free", alive - 1 if in_order else chance.randrange(alive)))
            alive -= 1
        if chance.random() < 0.15:
            steps.append(Step("empty"))
    return steps


# ---------------------------------------------------------------------------------------------------- both allocators


def run_in_pytorch(steps: list[Step]) -> Iterator[Counts]:
    """Make the calls to PyTorch's allocator, from an empty one, and leave it empty."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    before = torch.cuda.get_per_process_memory_fraction()
    others = [torch.cuda.Stream() for _ in range(2)]
    alive: list[int] = []
    try:
        for kind, number, stream in steps:
            is_out_of_memory = False
            if kind == "allocate":
                try:
                    on = others[stream - 1] if stream else torch.cuda.default_stream()
                    alive.append(torch.cuda.caching_allocator_alloc(int(number), stream=on))
                except torch.OutOfMemoryError:
                    is_out_of_memory = True
                    alive.append(0)
            elif kind == "free":
                address = alive.pop(int(number))
                if address:
                    torch.cuda.caching_allocator_delete(address)
            elif kind == "empty":
                torch.cuda.empty_cache()
            else:
                torch.cuda.set_per_process_memory_fraction(number)
            found = torch.cuda.memory_stats_as_nested_dict()
            yield Counts(
                found["allocated_bytes"]["all"]["current"],
                found["reserved_bytes"]["all"]["current"],
                found["reserved_bytes"]["all"]["peak"],
                found["num_alloc_retries"],
                is_out_of_memory,
            )
    finally:
        for address in filter(None, alive):
            torch.cuda.caching_allocator_delete(address)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(before)


def run_in_model(steps: list[Step], settings: AllocatorSettings, fraction: float) -> Iterator[Counts]:
    free_bytes, capacity_bytes = torch.cuda.mem_get_info()
    allocator = CachingAllocator(
        settings,
        available_bytes=free_bytes,
        cap_bytes=cap_bytes(fraction, capacity_bytes),
        capacity_bytes=capacity_bytes,
    )
    alive: list[int] = []
    for kind, number, stream in steps:
        is_out_of_memory = False
        if kind == "allocate":
            try:
                alive.append(allocator.allocate(int(number), stream))
            except OutOfDeviceMemory:
                is_out_of_memory = True
                alive.append(0)
        elif kind == "free":
            address = alive.pop(int(number))
            if address:
                allocator.free(address)
        elif kind == "empty":
            allocator.empty_cache()
        else:
            allocator.cap_bytes = cap_bytes(number, capacity_bytes)
        yield Counts(
            allocator.allocated_bytes,
            allocator.reserved_bytes,
            allocator.peak_reserved_bytes,
            allocator.retries,
            is_out_of_memory,
        )


def cap_bytes(fraction: float, capacity_bytes: int) -> int | None:
    return int(fraction * capacity_bytes) if fraction < 1 else None


def first_difference(steps: list[Step], settings: AllocatorSettings) -> tuple[str, Counter[str]]:
    """Return where the two differ, "" if nowhere, and what the sequence had."""
    fraction = torch.cuda.get_per_process_memory_fraction()
    had: Counter[str] = Counter(traces=1, calls=len(steps))
    model = run_in_model(steps, settings, fraction)
    found = ""
    for place, (step, real) in enumerate(zip(steps, run_in_pytorch(steps), strict=True)):
        predicted = next(model)
        if predicted != real and not found:
            found = f"step {place} of {len(steps)}, {step}: PyTorch {real}, model {predicted}"
        had["ran out"] += real.is_out_of_memory
    had["flushes"] += real.retries
    return found, had


# ---------------------------------------------------------------------------------------------------- processes


def check(settings_text: str, count: int, seed: int) -> dict[str, Any]:
    """Compare `count` random sequences in this process, which was started with the settings."""
    settings = AllocatorSettings.parse(settings_text)
    torch.cuda.init()
    total: Counter[str] = Counter()
    differences = []
    for number in range(count):
        steps = random_trace(random.Random(f"{settings_text} {seed} {number}"))
        difference, had = first_difference(steps, settings)
        total.update(had)
        if difference:
            differences.append(f"sequence {number}: {difference}")
    return {"settings": settings_text, "differences": differences, **total}


def check_in_process(settings_text: str, count: int, seed: int) -> dict[str, Any]:
    variables = {**os.environ, **environment(), "EMULATED_CUDA_GIB": str(DEVICE_GIB), "EMULATED_CUDA_DEVICES": "1"}
    variables.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    variables["PYTORCH_ALLOC_CONF"] = settings_text
    command = [sys.executable, "-m", __spec__.name, "--only", settings_text, "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="sequences, shared among the sets of options")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="compare in this process, which has these options")
    arguments = parser.parse_args()
    if arguments.only is not None:
        if not counters.is_active():
            sys.exit("This process is not on the emulated CUDA runtime. Leave --only out: it is started by itself.")
        print(json.dumps(check(arguments.only, arguments.count, arguments.seed)))
        return
    total: Counter[str] = Counter()
    failed = 0
    for settings_text in SETTINGS:
        found = check_in_process(settings_text, -(-arguments.count // len(SETTINGS)), arguments.seed)
        differences = found.pop("differences")
        del found["settings"]
        failed += len(differences)
        total.update(found)
        print(f"{settings_text or 'defaults'}: {dict(found)}, {len(differences)} differ")
        for difference in differences[:3]:
            print(f"  {difference}")
    print(f"together: {dict(total)}, {failed} differ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
