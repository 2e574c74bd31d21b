"""The suite: small models of every kind that people train, from configs, with nothing to download.

case = build("llama", "tiny")
tightfit.fit(case.model, case.batch, loss=case.loss, optimizer=case.optimizers(), budget=...)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.suite import language, other, recurrent, vision
from tests.suite.case import OPTIMIZER_KINDS, SIZES, Case, Size, make_optimizer

__all__ = ["OPTIMIZER_KINDS", "SIZES", "SUITE", "Case", "Size", "build", "make_optimizer"]

#: Each model's factory by its short name.
SUITE: dict[str, Callable[[Size], Case]] = {
    "gpt": language.gpt,
    "llama": language.llama,
    "bert": language.bert,
    "t5": language.t5,
    "mixtral": language.mixtral,
    "mamba": language.mamba,
    "lora": language.lora,
    "whisper": language.whisper,
    "vit": vision.vit,
    "swin": vision.swin,
    "convnext": vision.convnext,
    "resnet": vision.resnet,
    "unet": vision.unet,
    "densenet": vision.densenet,
    "lstm": recurrent.lstm,
    "gru": recurrent.gru,
    "rnn-loop": recurrent.rnn_loop,
    "tied": other.tied,
    "parametrized": other.parametrized,
    "fourier": other.fourier,
    "sparse-embedding": other.sparse_embedding,
    "two-losses": other.two_losses,
    "backward-inside": other.backward_inside,
}


def build(name: str, size: Size = "tiny") -> Case:
    """The named model with the same weights and batch at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SUITE[name](size)
