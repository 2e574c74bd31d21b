"""Steps of more than one network, and of more than one backward, of networks that libraries make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from benchmarks.zoo import families
from benchmarks.zoo.families.vision import timm_model
from benchmarks.zoo.subject import Subject, sum_of_squares


def build(family: str, name: str) -> Subject:
    kind, _, rest = name.partition("/")
    return _MAKERS[kind](rest)


def _adversarial(critic: str) -> Subject:
    """DCGAN's generator, against a network of timm as the critic: two kinds of steps."""
    channels = (32, 16, 8)
    layers: list[nn.Module] = [nn.ConvTranspose2d(16, channels[0], 8)]
    for inside, outside in zip(channels, (*channels[1:], 3), strict=True):
        layers += [nn.BatchNorm2d(inside), nn.ReLU(), nn.ConvTranspose2d(inside, outside, 4, 2, 1)]
    generator, judge = nn.Sequential(*layers, nn.Tanh()), timm_model(critic, 1)[0]
    models = {"generator": generator, "critic": judge}

    def critic_loss(models: Any, batch: Any) -> Tensor:
        real, noise = batch
        with torch.no_grad():
            made = models["generator"](noise)
        return F.softplus(-models["critic"](real)).mean() + F.softplus(models["critic"](made)).mean()

    def generator_loss(models: Any, batch: Any) -> Tensor:
        return F.softplus(-models["critic"](models["generator"](batch[1]))).mean()

    batch = torch.randn(4, 3, 64, 64), torch.randn(4, 16, 1, 1)
    return Subject(
        models,
        batch,
        {
            "critic": tightfit.Step(loss=critic_loss, optimizer=torch.optim.Adam(judge.parameters(), foreach=False)),
            "generator": tightfit.Step(
                loss=generator_loss, optimizer=torch.optim.Adam(generator.parameters(), foreach=False)
            ),
        },
    )


def _distilled(names: str) -> Subject:
    """A student learns from a teacher that only the loss reaches."""
    teacher, student = (timm_model(name)[0] for name in names.split("+"))
    teacher.requires_grad_(False).eval()

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(images).softmax(-1)
        return F.cross_entropy(model(images), wanted)

    return Subject.single(student, torch.randn(4, 3, 64, 64), loss)


def _momentum(name: str) -> Subject:
    """Two views, an encoder that trains and a slow copy of it, as in BYOL and MoCo; both given as models."""
    online = timm_model(name, 32)[0]
    slow = copy.deepcopy(online).requires_grad_(False)

    def loss(models: Any, views: Any) -> Tensor:
        ours, theirs = models
        with torch.no_grad():
            wanted = theirs(views[1])
        return 2 - 2 * F.cosine_similarity(ours(views[0]), wanted).mean()

    views = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.01, momentum=0.9, foreach=False)
    return Subject([online, slow], views, {"": tightfit.Step(loss=loss, optimizer=optimizer)})


def _contrastive(_: str) -> Subject:
    """CLIP of transformers: two towers in one model."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 320, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config=small | {"image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    batch = {
        "input_ids": torch.randint(3, 320, (4, 16)),
        "pixel_values": torch.randn(4, 3, 64, 64),
        "return_loss": True,
    }
    return Subject.single(CLIPModel(config), batch, lambda model, batch: model(**batch).loss)


def _gradient_penalty(critic: str) -> Subject:
    """WGAN-GP: the critic's gradient with respect to images has length one."""
    model = timm_model(critic, 1)[0]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, made = batch
        between = (0.3 * real + 0.7 * made).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()
        return model(made).mean() - model(real).mean() + 10 * penalty

    return Subject.single(model, (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)), loss)


def _forces(name: str) -> Subject:
    """An energy of torch-geometric, trained on forces."""
    inner = families.build("torch-geometric", name)
    kinds, places, molecule = inner.batch

    def loss(model: nn.Module, batch: Any) -> Tensor:
        kinds, places, molecule = batch
        at = places.detach().clone().requires_grad_()
        energy = model(kinds, at, molecule)
        (forces,) = torch.autograd.grad(energy.sum(), at, create_graph=True)
        return forces.pow(2).mean() + energy.pow(2).mean()

    return Subject.single(inner.models, (kinds, places, molecule), loss)  # type: ignore[arg-type]  # a single one


def _physics(width: str) -> Subject:
    """A network that solves u_t = u_xx: second derivatives in its loss."""
    size = int(width)
    layers: list[nn.Module] = [nn.Linear(2, size), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Linear(size, size), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(size, 1))

    def loss(model: nn.Module, points: Tensor) -> Tensor:
        at = points.detach().clone().requires_grad_()
        first = torch.autograd.grad(model(at).sum(), at, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)[0]
        return (first[:, 1] - second[:, 0]).pow(2).mean()

    return Subject.single(model, torch.rand(512, 2), loss)


def _meta(name: str) -> Subject:
    """MAML: the loss after one inner step, differentiated through it."""
    from torch.func import functional_call

    model = timm_model(name)[0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        shown, asked, labels = batch
        weights = dict(model.named_parameters())
        inner = F.cross_entropy(functional_call(model, weights, (shown,)), labels)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True, allow_unused=True)
        moved = {
            name: weight if slope is None else weight - 0.01 * slope
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        return F.cross_entropy(functional_call(model, moved, (asked,)), labels)

    batch = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), torch.arange(4)
    return Subject.single(model, batch, loss)


def _smooth(name: str) -> Subject:
    """R1 regularisation of a model of another family, with respect to its first floating-point input."""
    family, _, inside = name.partition("/")
    inner = families.build(family, inside)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        at = batch.detach().clone().requires_grad_()
        result = sum_of_squares(model(at))
        (slope,) = torch.autograd.grad(result, at, create_graph=True)
        return result + slope.pow(2).sum()

    return Subject.single(inner.models, inner.batch, loss)  # type: ignore[arg-type]  # a single one


_MAKERS: dict[str, Callable[[str], Subject]] = {
    "adversarial": _adversarial,
    "distilled": _distilled,
    "momentum": _momentum,
    "contrastive": _contrastive,
    "gradient-penalty": _gradient_penalty,
    "forces": _forces,
    "physics": _physics,
    "meta": _meta,
    "smooth": _smooth,
}
