"""What does not fit a family: tied and parametrized weights, complex numbers, sparse gradients, several losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.suite.case import Case, OptimizerKind, Size, make_optimizer


class TiedAutoencoder(nn.Module):
    """One block called several times; the decoder uses the encoder's weights, transposed."""

    def __init__(self, width: int, hidden: int, calls: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, hidden)
        self.block = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        self.bias = nn.Parameter(torch.zeros(width))
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encode(x)
        for _ in range(self.calls):
            hidden = hidden + self.block(hidden)
        return F.linear(hidden, self.encode.weight.t(), self.bias)


def _reconstruction_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch)


def tied(size: Size) -> Case:
    """Weights used twice, a block called several times."""
    rows, width, hidden, calls = (8, 24, 16, 3) if size == "tiny" else (4096, 96, 128, 6)
    return Case(model=TiedAutoencoder(width, hidden, calls), batch=torch.randn(rows, width), loss=_reconstruction_loss)


class Symmetric(nn.Module):
    """A parametrization that makes a square matrix symmetric."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.triu() + matrix.triu(1).mT


def parametrized(size: Size) -> Case:
    """Weights that are computed: symmetric, weight norm, and spectral norm, whose buffers change in forward."""
    rows, width, layers = (8, 16, 2) if size == "tiny" else (4096, 128, 4)
    modules: list[nn.Module] = []
    for _ in range(layers):
        symmetric = nn.Linear(width, width)
        parametrize.register_parametrization(symmetric, "weight", Symmetric())
        modules.append(
            nn.Sequential(
                symmetric,
                nn.GELU(),
                parametrizations.weight_norm(nn.Linear(width, width)),
                nn.Tanh(),
                parametrizations.spectral_norm(nn.Linear(width, width)),
            )
        )
    return Case(model=nn.Sequential(*modules), batch=torch.randn(rows, width), loss=_reconstruction_loss)


class SpectralConv(nn.Module):
    """Multiplies the lowest frequencies by complex weights, as a Fourier neural operator does."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.complex64) / width)
        self.modes = modes
        self.skip = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft(x)
        mixed = torch.zeros_like(frequencies)
        mixed[..., : self.modes] = torch.einsum("bim,iom->bom", frequencies[..., : self.modes], self.weight)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x))


def fourier(size: Size) -> Case:
    """Complex numbers: a Fourier neural operator."""
    rows, points, width, modes, layers = (2, 32, 8, 5, 2) if size == "tiny" else (16, 512, 32, 24, 4)
    model = nn.Sequential(
        nn.Conv1d(1, width, 1), *(SpectralConv(width, modes) for _ in range(layers)), nn.Conv1d(width, 1, 1)
    )
    return Case(model=model, batch=torch.randn(rows, 1, points), loss=_reconstruction_loss)


class Ranking(nn.Module):
    """Embeddings with sparse gradients under a dense tower."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, sparse=True)
        self.tower = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        return self.tower(self.items(pairs).flatten(-2)).squeeze(-1)


def _click_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pairs, clicks = batch
    return F.binary_cross_entropy_with_logits(model(pairs), clicks)


def sparse_embedding(size: Size) -> Case:
    """Sparse gradients, taken by SparseAdam."""
    rows, items, width = (16, 40, 8) if size == "tiny" else (16384, 2000, 32)
    model = Ranking(items, width)

    def optimizers(kind: OptimizerKind) -> tuple[torch.optim.Optimizer, ...]:
        sparse = torch.optim.SparseAdam(list(model.items.parameters()), lr=1e-3)
        return sparse, make_optimizer(list(model.tower.parameters()), kind)

    batch = torch.randint(0, items, (rows, 2)), torch.randint(0, 2, (rows,)).float()
    return Case(model=model, batch=batch, loss=_click_loss, own_optimizers=optimizers)


class Adversaries(nn.Module):
    """A generator and a discriminator."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2, inplace=True), nn.Linear(hidden, width)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(hidden, hidden), nn.Tanh(),
            nn.Linear(hidden, 1),
        )  # fmt: skip


def _adversaries(size: Size) -> tuple[Adversaries, tuple[Tensor, Tensor], int]:
    rows, width, hidden = (8, 12, 16) if size == "tiny" else (8192, 64, 192)
    return Adversaries(width, hidden), (torch.randn(rows, width), torch.randn(rows, width)), rows


def _both_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    noise, real = batch
    fake = model.generator(noise)
    judge = model.discriminator
    recognise = F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()
    convince = F.softplus(-judge(fake)).mean()
    return recognise + 0.5 * convince


def two_losses(size: Size) -> Case:
    """Two losses of one step, two optimizers of different kinds."""
    model, batch, _ = _adversaries(size)

    def optimizers(kind: OptimizerKind) -> tuple[torch.optim.Optimizer, ...]:
        generator = make_optimizer(list(model.generator.parameters()), kind)
        return generator, torch.optim.SGD(model.discriminator.parameters(), lr=1e-3)

    return Case(model=model, batch=batch, loss=_both_losses, own_optimizers=optimizers)


def _discriminator_first(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    noise, real = batch
    fake = model.generator(noise)
    judge = model.discriminator
    (F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()).backward()
    return F.softplus(-judge(fake)).mean()


def backward_inside(size: Size) -> Case:
    """The loss function runs a backward of its own: the discriminator's, before the generator's."""
    model, batch, _ = _adversaries(size)

    def optimizers(kind: OptimizerKind) -> tuple[torch.optim.Optimizer, ...]:
        return tuple(make_optimizer(list(part.parameters()), kind) for part in (model.generator, model.discriminator))

    return Case(model=model, batch=batch, loss=_discriminator_first, own_optimizers=optimizers)
