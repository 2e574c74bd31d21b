"""What a model asks of its batch's own numbers is answered without running the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.profiling.measure import measure_step
from tightfit.records import Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.step.step import Step

TOKENS = torch.arange(1, 25).reshape(2, 12)
LENGTHS = torch.tensor([12, 7])
PADDED = torch.arange(12) < LENGTHS[:, None]


def names(profile: Profile) -> list[str]:
    return [profile.signatures[op.signature].name for op in profile.ops]


def assert_as_for_real(model: nn.Module, batch: Any, *, dependent: bool, **step: Any) -> None:
    profile = tightfit.measure(model, batch, **step)
    real = measure_step(model, batch, Step(**step), concrete=True)
    assert (profile.method, profile.data_dependent) == ("fake", dependent)
    assert names(profile) == names(real)
    peaks = [simulate(ProfileIndex(p), [None] * len(p.regions)).peak_bytes for p in (profile, real)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["full", "padded"])
def test_transformers_masks(name: str, mask: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(name, **sizes, vocab_size=32, bos_token_id=1, eos_token_id=2)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config).train()
    batch = {"input_ids": TOKENS, "labels": TOKENS, "attention_mask": mask.long()}
    assert_as_for_real(model, batch, dependent=False)
    described = tightfit.measure(model.bfloat16(), batch, device="rtx4090-24gb")
    masked = {"efficient" in name for name in names(described) if "scaled_dot" in name}
    assert masked == {not mask.all()}  # flash attention takes no mask
    asks = transformers.utils.import_utils.is_fake_tensor
    assert asks.__module__ == "transformers.utils.import_utils"  # and not what stood for it while measuring


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.linear(self.embedding(tokens)).tanh()
        return result


def up_to_the_longest(model: nn.Module, batch: Any) -> Tensor:
    tokens, lengths = batch
    result: Tensor = model(tokens[:, : int(lengths.max()) - 2])
    return result.sum()


def as_often_as_the_first_token_says(model: nn.Module, batch: Any) -> Tensor:
    tokens = batch[0].clone()
    tokens[:, 0] += 2  # its views are followed
    result: Tensor = model(tokens)
    for _ in range(int(tokens[0, 0])):
        result = result.sin()
    return result.sum()


def no_layer_is_left_out(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0])
    for share in (0.0, 0):
        if torch.rand([]) < share:
            return result.mean()
    return result.sum() if torch.rand(1) < 1.0 else result.mean()


@pytest.mark.parametrize("loss", [up_to_the_longest, as_often_as_the_first_token_says, no_layer_is_left_out])
def test_numbers_that_follow_from_the_batch(loss: Callable[..., Tensor]) -> None:
    tokens = TOKENS.clone()
    assert_as_for_real(Net(), (tokens, LENGTHS), dependent=True, loss=loss)
    assert tokens.equal(TOKENS)


def overwritten(model: nn.Module, batch: Any) -> Tensor:
    tokens = batch[0].clone()
    first = tokens[:, 0]
    result: Tensor = model(tokens)
    tokens.copy_(result[..., 0] > 0)  # what the model computes is not known
    return result[: 1 + int(first[0])].sum()


def drawn(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0])
    return result[: 1 + int(torch.randint(2, (1,)))].sum()


def some_layer_is_left_out(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0])
    return result.sum() if torch.rand([]) < 0.5 else result.mean()


def of_weights(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0])
    return result[: 1 + int(result[0].argmax() > 0)].sum()


@pytest.mark.parametrize("loss", [overwritten, drawn, some_layer_is_left_out, of_weights])
def test_numbers_that_do_not_take_a_real_step(loss: Callable[..., Tensor]) -> None:
    profile = tightfit.measure(Net(), (TOKENS, LENGTHS), loss=loss)
    assert (profile.method, profile.data_dependent) == ("real", True)
