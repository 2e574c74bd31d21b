"""Llama with its norms and gates as Triton kernels: what a plan can still drop, and whether that is exact."""

from __future__ import annotations

import torch

import tightfit
from benchmarks.gpu_check.models import trained_llama
from benchmarks.gpu_check.registry import Report, Skip, check
from tests.emulated_cuda.counters import is_active
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.solver import Solver


@check(
    "kernels", place=14, seconds=75, shows="the droppable share of Llama's saved bytes, without and with Triton kernels"
)
def kernels(report: Report) -> None:
    """Measure two Llamas at the sizes of 8 B, and verify the plan that drops the most."""
    try:
        from benchmarks.gpu_check.triton_kernels import TritonRmsNorm, triton_silu_times
    except ImportError as error:
        raise Skip(f"Triton cannot be imported: {error}") from None
    for case, parts in (("PyTorch", {}), ("Triton", {"norm": TritonRmsNorm, "gate": triton_silu_times})):
        model, tokens, step = trained_llama(**parts)
        profile = tightfit.measure(model, tokens, step=step)
        saved, held = _layer_bytes(profile)
        solver = Solver(profile)
        report.note(
            case, method=profile.method, saved_by_layer_bytes=saved, held_by_layer_bytes=held,
            droppable=1 - held / saved if saved else None,
            smallest_above_resident_bytes=solver.smallest().peak_bytes - profile.baseline_bytes,
            plain_above_resident_bytes=solver.plain(0).predicted_peak_bytes - profile.baseline_bytes,
        )  # fmt: skip
        plan = solver.smallest_plan()
        verdict = tightfit.verify(model, tokens, plan, step=step, reference_budget_bytes=2**50)
        report.note(case, method=verdict.method, ok=verdict.ok, not_reproducible=len(verdict.not_reproducible),
                    replayed=verdict.replayed_ops, mismatches=verdict.mismatches, reason=verdict.reason)  # fmt: skip
        report.claim(case, "the smallest plan's step does not differ", not verdict.differing, needs_results=True)
        report.claim(case, "it runs as planned", verdict.mismatches == 0 or profile.method == "real")
        del model, tokens, step
        torch.cuda.empty_cache()
    if not is_active():
        _claim_kernels_are_right(report)


def _layer_bytes(profile: tightfit.Profile) -> tuple[int, int]:
    """Return what the first layer saves, and what of it is held by the plan that drops all that can be dropped."""
    index = ProfileIndex(profile)
    full = Solver(profile).full(2**50)
    recipe_of = {region.key: full.recipes[region.recipe] for region in full.regions if region.recipe >= 0}
    saved = held = 0
    for number, region in enumerate(profile.regions):
        if not region.key.startswith("layers.0"):
            continue
        slots = [slot for slot in index.profile.slots if slot.region == number]
        storages = {profile.values[slot.value].storage for slot in slots}
        nbytes = sum(profile.storages[s].nbytes for s in storages if profile.storages[s].component == "activation")
        saved += nbytes
        held += recipe_of[region.key].held_bytes if region.key in recipe_of else nbytes
    return saved, held


def _claim_kernels_are_right(report: Report) -> None:
    """Compare the Triton kernels with PyTorch's own operations, or the figures would be of something else."""
    from benchmarks.gpu_check.triton_kernels import TritonRmsNorm, triton_silu_times
    from benchmarks.llama import RmsNorm, silu_times

    torch.manual_seed(0)
    x, y = (torch.randn(64, 512, device="cuda", requires_grad=True) for _ in range(2))
    pairs = [
        (RmsNorm(512).to("cuda")(x), TritonRmsNorm(512).to("cuda")(x)),
        (silu_times(x, y), triton_silu_times(x, y)),
    ]
    for ours, theirs in pairs:
        given = torch.randn_like(ours)
        gradients = [torch.autograd.grad(result, x, given)[0] for result in (ours, theirs)]
        close = torch.allclose(ours, theirs, atol=1e-4) and torch.allclose(*gradients, atol=1e-4)
        report.claim("Triton kernels", "they compute what PyTorch computes", close)
