"""Measure what of a Llama layer's saved bytes a plan can drop, by whose kernels the layer runs on.

    python -m tests.emulated_cuda.run python -m benchmarks.llama_kernels     # emulated devices do: bytes are counted

Layers have the sizes of Llama 3 with 8 B parameters, in bf16, and 2 x 4096 tokens. Kernels that no dispatcher sees are
Triton's, launched from Python as Liger's are; attention is also run by a custom operator, as flash_attn brings it.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import tightfit
from benchmarks.gpu_check.flash_attention import flash_attend
from benchmarks.llama import LLAMA_8B, Llama, Parts
from tightfit.solver.solver import Solver

MIB = 2**20
#: The table compares layers, so that what the ends of a model hold must not hide them.
SIZES = replace(LLAMA_8B, layers=2, vocabulary=1024)


def variants() -> dict[str, Parts]:
    """Return what the layers are made of; without Triton only what needs none."""
    flash = Parts(attention=flash_attend)
    found = {"PyTorch's operations": Parts(), "attention as a custom operator": flash}
    try:
        from benchmarks.gpu_check.triton_kernels import TritonRmsNorm, triton_rotate, triton_silu_times
    except ImportError:
        return found
    triton = Parts(norm=TritonRmsNorm, gate=triton_silu_times, rotate=triton_rotate)
    found["norms, rotation and gates by Triton"] = triton
    found["both"] = replace(triton, attention=flash_attend)
    return found


@dataclass(frozen=True)
class LayerBytes:
    """What the first layer's regions save, and what of it is held by the plan that drops all that it can."""

    saved: int
    held: int

    @classmethod
    def of(cls, profile: tightfit.Profile) -> LayerBytes:
        """Add up the regions of ``layers.0``."""
        full = Solver(profile).full(2**50)
        recipe_of = {region.key: full.recipes[region.recipe] for region in full.regions if region.recipe >= 0}
        saved = held = 0
        for number, region in enumerate(profile.regions):
            if not region.key.startswith("layers.0"):
                continue
            slots = [slot for slot in profile.slots if slot.region == number]
            storages = {profile.values[slot.value].storage for slot in slots}
            nbytes = sum(profile.storages[s].nbytes for s in storages if profile.storages[s].component == "activation")
            saved += nbytes
            held += recipe_of[region.key].held_bytes if region.key in recipe_of else nbytes
        return cls(saved, held)

    @property
    def droppable(self) -> float:
        """The share of the saved bytes that the plan does not hold."""
        return 1 - self.held / self.saved


@dataclass(frozen=True)
class Row:
    """One kind of kernels."""

    name: str
    method: str
    saved_by_layer_bytes: int
    droppable: float
    smallest_above_resident_bytes: int
    plain_above_resident_bytes: int


def row_of(name: str, parts: Parts) -> Row:
    """Measure the model that is made of `parts`."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(SIZES, parts).to(torch.bfloat16).train()
        tokens = torch.randint(0, SIZES.vocabulary, (2, 4097))
    profile = tightfit.measure(model, tokens, loss=lambda model, tokens: model(tokens))
    solver, layer = Solver(profile), LayerBytes.of(profile)
    return Row(
        name=name,
        method=profile.method,
        saved_by_layer_bytes=layer.saved,
        droppable=layer.droppable,
        smallest_above_resident_bytes=solver.smallest().peak_bytes - profile.baseline_bytes,
        plain_above_resident_bytes=solver.plain(0).predicted_peak_bytes - profile.baseline_bytes,
    )


def main() -> None:
    """Print the table, and write it where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    output = parser.parse_args().output
    print(f"{'kernels':36} {'saved by a layer':>16} {'droppable':>9}  smallest and plain step above resident memory")
    rows = []
    for name, parts in variants().items():
        row = row_of(name, parts)
        rows.append(row)
        smallest, plain = row.smallest_above_resident_bytes / MIB, row.plain_above_resident_bytes / MIB
        saved = f"{row.saved_by_layer_bytes / MIB:.0f} MiB"
        print(f"{name:36} {saved:>16} {row.droppable:9.1%}  {smallest:.0f} of {plain:.0f} MiB", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
