"""Profiles for a GPU that is not here: what a step holds there, by CUDA's rules, without data and without CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tightfit
from tightfit._torch_private.described import autocast_lists
from tightfit.errors import UnsupportedInput
from tightfit.records import Profile

CARD = "rtx3090-24gb"


FLASH = "aten._scaled_dot_product_flash_attention.default"


def measured(model: torch.nn.Module, *shape: int, dtype: Any = None, **options: Any) -> Profile:
    model = model.to("meta")
    batch = torch.empty(shape, dtype=dtype, device="meta")
    return tightfit.measure(model, batch, loss=lambda m, b: m(b).float().sum(), device=CARD, **options)


def outputs(profile: Profile, name: str) -> list[int]:
    """Return the bytes of what operations of that name make."""
    ops = [op for op in profile.ops if profile.signatures[op.signature].name == name]
    return [profile.storages[profile.values[value].storage].nbytes for op in ops for value in op.outputs]


class Attention(torch.nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, self.mask(x), is_causal=self.mask(x) is None)

    def mask(self, x: torch.Tensor) -> torch.Tensor | None:
        return None


class Masked(Attention):
    def mask(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def test_a_step_without_data_takes_what_its_tensors_take() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
    profile = measured(model, 256, 1024, optimizer=torch.optim.AdamW(model.to("meta").parameters()))
    numbers = 1024 * 1024 + 1024 + 1024 + 1
    assert profile.baseline["parameters"] == profile.baseline["gradients"] == 4 * numbers + 508  # one number rounds up
    assert profile.baseline["optimizer_state"] == 2 * profile.baseline["parameters"]
    assert outputs(profile, "aten.addmm.default") == [4 * 256 * 1024, 4 * 256]
    assert profile.device == CARD


def test_the_model_is_left_alone() -> None:
    model = torch.nn.Linear(4, 4)
    weight, place = model.weight, model.weight.device
    tightfit.measure(model, torch.ones(2, 4), loss=lambda m, b: m(b).sum(), device=CARD)
    assert model.weight is weight
    assert weight.device == place
    assert weight.grad is None
    assert not torch.is_autocast_enabled("cuda")


def test_dropout_saves_a_mask_of_bytes() -> None:
    profile = measured(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.1)), 128, 64)
    assert outputs(profile, "aten.native_dropout.default") == [4 * 128 * 64, 128 * 64]


def test_attention_in_single_precision_saves_a_sum_for_each_row() -> None:
    profile = measured(Attention(), 2, 96, 64)
    made = outputs(profile, "aten._scaled_dot_product_efficient_attention.default")
    assert made[:2] == [4 * 2 * 96 * 64, 4 * 2 * 4 * 96]


def test_attention_in_halves_is_flash_attention_where_there_is_no_mask() -> None:
    assert outputs(measured(Attention(), 2, 96, 64, autocast=torch.bfloat16), FLASH)[0] == 2 * 2 * 96 * 64
    masked = measured(Masked(), 2, 96, 64, autocast=torch.bfloat16)
    assert not outputs(masked, FLASH)
    assert outputs(masked, "aten._scaled_dot_product_efficient_attention.default")


def test_an_old_card_has_no_flash_attention() -> None:
    model = Attention().to("meta")
    batch = torch.empty(2, 96, 64, device="meta")
    step = tightfit.Step(loss=lambda m, b: m(b).float().sum(), autocast=torch.float16)
    old = tightfit.measure(model, batch, step=step, device="t4-16gb")
    assert not outputs(old, FLASH)  # which needs compute capability 8.0
    assert outputs(old, "aten._scaled_dot_product_efficient_attention.default")


def test_models_see_their_tensors_on_cuda() -> None:
    cuda = torch.device("cuda", 0)

    class Looks(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert (x.device, x.is_cuda, x.is_meta, x.get_device()) == (cuda, True, False, 0)
            assert torch.zeros(1, device=x.device).device == self.weight.device == cuda
            assert torch.ones(1).device == torch.device("cpu")
            assert torch.ones(1).to(x.device).device == cuda
            return super().forward(x) * torch.tensor([2.0], device="cuda")

    measured(Looks(4, 4), 2, 4)


class IndexesWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        softmax = x.softmax(-1)
        ctx.save_for_backward(softmax)
        return softmax.log()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (softmax,) = ctx.saved_tensors
        rows = torch.arange(softmax.shape[0], device=softmax.device)
        softmax[rows, rows] -= 1.0
        return softmax * gradient


def test_an_autograd_function_finds_what_it_saved_where_it_was() -> None:
    """It saves in Python, where a model's code sees ``cuda``: an index asked a build without CUDA for that device."""

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = IndexesWhatItSaved.apply(super().forward(x))
            return found

    profile = measured(Model(8, 8), 4, 8)
    assert [slot for slot in profile.slots if profile.values[slot.value].op >= 0]


def test_autocast_casts_as_cuda_does() -> None:
    """Products in halves, layer norm and softmax in single precision, each weight once."""
    width = 64
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.LayerNorm(width), torch.nn.Softmax(-1), torch.nn.Linear(width, width)
    )
    model.append(model[0])
    profile = measured(model, 16, width, autocast=torch.bfloat16)
    assert outputs(profile, "aten.addmm.default") == [2 * 16 * width] * 3
    assert outputs(profile, "aten.native_layer_norm.default")[0] == 4 * 16 * width
    assert outputs(profile, "aten._softmax.default") == [4 * 16 * width]
    assert outputs(profile, "aten._to_copy.default").count(2 * width * width) == 2  # the tied weight once


def test_cross_entropy_under_autocast_widens_what_its_softmax_made() -> None:
    """It tells log_softmax the dtype of its input, so that autocast leaves that alone."""
    model = torch.nn.Linear(64, 64).to("meta")
    batch = torch.empty(32, 64, device="meta")

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch), torch.zeros(32, dtype=torch.long, device=batch.device))

    profile = tightfit.measure(model, batch, loss=loss, autocast=torch.float16, device=CARD)
    assert outputs(profile, "aten._log_softmax.default") == [2 * 32 * 64]
    assert outputs(profile, "aten._to_copy.default")[-1] == 4 * 32 * 64


def test_what_depends_on_data_is_refused() -> None:
    class Branches(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x * self.weight.sum()

    with pytest.raises(UnsupportedInput, match="depends on the values"):
        measured(Branches(4, 4), 2, 4)


def test_a_plan_for_a_card_drops_what_does_not_fit() -> None:
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh()) for _ in range(8)))
    profile = measured(model, 65536, 256)
    plain = tightfit.solve(profile, budget_bytes=24 * 2**30)
    smaller = tightfit.solve(profile, budget_bytes=int(plain.predicted_peak_bytes * 0.9))
    assert plain.is_plain
    assert not smaller.is_plain
    assert smaller.predicted_peak_bytes <= 0.9 * plain.predicted_peak_bytes
    assert smaller.predicted_step_ms > plain.predicted_step_ms


def test_the_lists_of_autocast_are_those_that_pytorch_registers() -> None:
    """All that has a kernel for it, but for what our tensors never are (cuDNN's own convolutions), or raises."""
    registered = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    }
    listed = {name for names in autocast_lists().values() for name in names}
    others = {"cudnn_convolution", "cudnn_convolution_transpose", "binary_cross_entropy"}
    assert registered - listed == others
    assert listed <= registered


def test_its_profile_is_solved_and_simulated_without_pytorch(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh()) for _ in range(4)))
    measured(model, 65536, 256).save(file)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import tightfit\n"
        "from tightfit.simulation.profile_index import ProfileIndex\n"
        "from tightfit.simulation.step_requests import requests_of\n"
        "from tightfit.simulation.training_loop import Clearing, run_loop\n"
        f"profile = tightfit.Profile.load({str(file)!r})\n"
        "plan = tightfit.solve(profile, budget_bytes=20 * 2**30)\n"
        "step = requests_of(ProfileIndex(profile), [None] * len(profile.regions))\n"
        "peaks = run_loop(step, profile.allocator, iterations=2, clearing=Clearing.NEVER)\n"
        "assert plan.is_plain and peaks.allocated_bytes <= plan.predicted_reserved_bytes\n"
        "print(plan.predicted_allocated_bytes == peaks.allocated_bytes)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "True", found.stderr


def test_adafactor_takes_one_tensor_after_another_as_it_does_where_nobody_asks_for_more() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)).to("meta")
    profile = measured(model, 16, 256, optimizer=torch.optim.Adafactor(model.parameters()))
    assert not [one for one in profile.signatures if one.name.startswith("aten._foreach")]
    adam = measured(model, 16, 256, optimizer=torch.optim.AdamW(model.parameters()))
    assert [one for one in adam.signatures if one.name.startswith("aten._foreach")]
