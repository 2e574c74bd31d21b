"""Is a planned step the plain step, bit for bit, on a GPU: with deterministic kernels and without."""

from __future__ import annotations

import torch

import tightfit
from benchmarks.gpu_check.models import adamw, small
from benchmarks.gpu_check.registry import Report, check
from benchmarks.gpu_check.replay_watch import watching_replay
from tightfit.solver.solver import Solver

_PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}
_NO_LIMIT = 2**50


@check("bits", place=3, seconds=90, shows="three planned steps equal three plain ones, with deterministic kernels")
def bits(report: Report) -> None:
    """Fit at half of what can be saved, and verify three steps."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    capacity = torch.cuda.get_device_properties(0).total_memory
    for name in ("mixer", "gpt", "resnet", "llama"):
        for precision, autocast in _PRECISIONS.items():
            model, batch, loss = small(name)
            step = adamw(model, loss, autocast)
            profile = tightfit.measure(model, batch, step=step)
            solver = Solver(profile)
            smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
            plan = solver.solve((smallest + plain) // 2)
            verdict = tightfit.verify(model, batch, plan, step=step, steps=3, reference_budget_bytes=capacity)
            case = f"{name}, {precision}"
            report.note(case, method=verdict.method, replayed=verdict.replayed_ops, share=verdict.compared_share)
            report.claim(
                case, "operations are replayed, all as planned", verdict.replayed_ops > 0 and not verdict.mismatches
            )
            report.claim(
                case, "plain reproduces itself", verdict.plain_reproducible is True, needs_results=True,
                differing=verdict.not_reproducible[:5],
            )  # fmt: skip
            report.claim(
                case, "the bits are plain's", not verdict.differing, needs_results=True,
                differing=verdict.differing[:5], by=verdict.max_abs_difference,
            )  # fmt: skip
            report.claim(case, "the random state is plain's", verdict.rng_equal is True)


@check("replay", place=4, seconds=60, shows="what is replayed has the bits of what was dropped, where backward varies")
def replay(report: Report) -> None:
    """Drop all that can be dropped, with the kernels that training uses, and compare each tensor when it is read."""
    for name in ("mixer", "gpt", "resnet", "llama"):
        for precision, autocast in _PRECISIONS.items():
            model, batch, loss = small(name)
            step = adamw(model, loss, autocast)
            profile = tightfit.measure(model, batch, step=step)
            _claim_exact_replay(report, f"{name}, {precision}", model, batch, step, profile)


def _claim_exact_replay(
    report: Report,
    case: str,
    model: torch.nn.Module,
    batch: object,
    step: tightfit.Step,
    profile: tightfit.Profile,
) -> None:
    with tightfit.apply(model, Solver(profile).full(_NO_LIMIT), step=step) as applied, watching_replay() as watch:
        for _ in range(2):  # in the first, every region checks itself
            applied.loss(model, batch).backward()
            step.run_optimizers(model)
        refused = sum(map(len, applied.refused.values()))
    differing = watch.differing()
    report.note(case, dropped=watch.dropped, compared=watch.compared, refused_by_self_checks=refused)
    report.claim(case, "what was dropped was replayed and compared", watch.compared > 0)
    report.claim(case, "it has the same bits", not differing, needs_results=True, differing=differing[:5])


@check("libraries", place=5, seconds=45, shows="cuDNN's dropout states and chosen algorithms keep planned steps exact")
def libraries(report: Report) -> None:
    """An LSTM with dropout beside a dropped Dropout; convolutions while cuDNN tries algorithms out."""
    for name, benchmark in (("lstm", False), ("resnet", True)):
        torch.backends.cudnn.benchmark = benchmark
        model, batch, loss = small(name)
        step = adamw(model, loss)
        case = f"{name}, benchmark={benchmark}"
        profile = tightfit.measure(model, batch, step=step)
        report.note(case, method=profile.method)
        plan = Solver(profile).full(_NO_LIMIT)
        verdict = tightfit.verify(model, batch, plan, step=step, steps=3, reference_budget_bytes=_NO_LIMIT)
        report.note(
            case, ok=verdict.ok, differing=verdict.differing[:5], not_reproducible=verdict.not_reproducible[:5],
            mismatches=verdict.mismatches,
        )  # fmt: skip
        report.claim(case, "three steps do not differ from plain's", not verdict.differing, needs_results=True)
        report.claim(case, "the random state is plain's", verdict.rng_equal is True)
        report.claim(case, "three steps run as planned", verdict.mismatches == 0)
        _claim_exact_replay(report, case, model, batch, step, profile)
