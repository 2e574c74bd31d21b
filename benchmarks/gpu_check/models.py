"""The models of the checks: small ones for bits, and Llama at sizes that are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llama import LLAMA_8B, Llama, LlamaSizes, Parts
from tests.emulated_cuda.counters import is_active
from tightfit.step.step import Step
from tightfit.train.models.gpt import Gpt, GptConfig
from tightfit.train.models.lstm import Lstm, LstmConfig
from tightfit.train.models.resnet import Resnet, ResnetConfig

Made = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]


def _next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def _own_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens)
    return loss


class Mixer(nn.Module):
    """PyTorch's own encoder layers, with dropout in and behind attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.head = nn.Linear(width, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def _mixer() -> Made:
    return Mixer(256), torch.randint(0, 512, (16, 129)), _next_token


def _gpt() -> Made:
    config = GptConfig(vocabulary_size=512, width=256, layers=4, heads=4, sequence_length=256)
    return Gpt(config), torch.randint(0, 512, (16, 257)), _next_token


def _resnet() -> Made:
    config = ResnetConfig(width=32, blocks=2)
    return Resnet(config), (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))), _class


def _lstm() -> Made:
    return Lstm(LstmConfig(vocabulary_size=512, width=256)), torch.randint(0, 512, (32, 129)), _next_token


def _llama() -> Made:
    sizes = LlamaSizes(hidden=256, heads=8, kv_heads=2, intermediate=704, layers=4, vocabulary=512)
    return Llama(sizes), torch.randint(0, 512, (8, 257)), _own_loss


SMALL: dict[str, Callable[[], Made]] = {
    "mixer": _mixer,
    "gpt": _gpt,
    "resnet": _resnet,
    "llama": _llama,
    "lstm": _lstm,
}


def small(name: str) -> Made:
    """Return a small model on the GPU, its batch and its loss."""
    torch.manual_seed(0)
    model, batch, loss = SMALL[name]()
    return model.to("cuda").train(), on_gpu(batch), loss


def on_gpu(batch: Any) -> Any:
    """Move a tensor, or a tuple of them, to the GPU."""
    return tuple(part.to("cuda") for part in batch) if isinstance(batch, tuple) else batch.to("cuda")


def adamw(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], autocast: torch.dtype | None = None) -> Step:
    """Return the usual step of a model."""
    return Step(loss=loss, optimizer=torch.optim.AdamW(model.parameters()), autocast=autocast)


def trained_llama(parts: Parts | None = None) -> tuple[Llama, Tensor, Step]:
    """Return Llama in bf16 on the GPU at sizes that are trained, a batch of 2 x 4096 tokens, and its step.

    On an emulated device it is narrower: what planning copies to the host is real there.
    """
    sizes = LlamaSizes(hidden=1024, heads=8, kv_heads=2, intermediate=3584, layers=4) if is_active() else LLAMA_8B
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(sizes, parts or Parts()).to(torch.bfloat16).train()
        tokens = torch.randint(0, sizes.vocabulary, (2, 4097))
    return model, tokens, adamw(model, _own_loss)
