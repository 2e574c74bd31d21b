"""Convolutions while cuDNN tries kernels out: it remembers by thread which one was the fastest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tests.replay.test_module_recompute import recompute_all
from tightfit.replay.refusals import CannotRebuild
from tightfit.solver.solver import full_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

WHY = "cuDNN tries kernels out"


@pytest.fixture(autouse=True)
def _benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = before


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def made() -> tuple[nn.Module, Tensor]:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU())

    return nn.Sequential(block(), block()).to("cuda"), torch.randn(4, 8, 16, 16, device="cuda")


def kept(profile: tightfit.Profile) -> list[str]:
    return [op.keep_reason for op in profile.ops if "convolution" in profile.signatures[op.signature].name]


def test_they_are_kept_and_the_plan_says_why() -> None:
    model, batch = made()
    profile = tightfit.measure(model, batch, loss=squares)
    assert [WHY in reason for reason in kept(profile)] == [True] * 4
    assert not any(region.module_recomputable for region in profile.regions)
    recipes = full_plan(profile, 2**50).recipes
    assert any(WHY in value.reason for recipe in recipes for value in recipe.kept_for_safety)


def test_they_are_replayed_where_backward_runs_in_forwards_thread() -> None:
    model, batch = made()
    with torch.autograd.set_multithreading_enabled(False):
        profile = tightfit.measure(model, batch, loss=squares)
        assert kept(profile) == [""] * 4
        with tightfit.apply(model, full_plan(profile, 2**50)) as applied:
            squares(model, batch).backward()
            assert applied.statistics.kept_unsafe == 0
            assert applied.statistics.replayed_ops > 0
            loss = squares(model, batch)
    with pytest.raises(CannotRebuild, match=WHY):  # in another thread after all
        loss.backward()


def test_a_plan_made_without_trying_keeps_them_while_cudnn_tries() -> None:
    model, batch = made()
    torch.backends.cudnn.benchmark = False
    profile = tightfit.measure(model, batch, loss=squares)
    assert kept(profile) == [""] * 4
    with tightfit.apply(model, full_plan(profile, 2**50)) as applied:
        squares(model, batch).backward()
        replayed = applied.statistics.replayed_ops
        torch.backends.cudnn.benchmark = True
        applied.statistics.reset()
        squares(model, batch).backward()
        assert applied.statistics.replayed_ops < replayed


def test_modules_are_called_again_in_backward_only_where_cudnn_does_not_try() -> None:
    model, batch = made()
    torch.backends.cudnn.benchmark = False
    profile = tightfit.measure(model, batch, loss=squares)
    with tightfit.apply(model, recompute_all(profile)) as applied:
        squares(model, batch).backward()
        assert applied.statistics.recomputed_calls == 2
        loss = squares(model, batch)
        torch.backends.cudnn.benchmark = True
        with pytest.raises(CannotRebuild, match=WHY):
            loss.backward()
        applied.statistics.reset()
        squares(model, batch).backward()
        assert applied.statistics.recomputed_calls == 0
