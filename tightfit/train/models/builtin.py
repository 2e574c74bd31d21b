"""The models that come with tightfit, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts
from tightfit.train.models.gpt import Gpt, GptConfig
from tightfit.train.models.lstm import Lstm, LstmConfig
from tightfit.train.models.resnet import Resnet, ResnetConfig
from tightfit.train.models.source import BuiltModel, ModelSource
from tightfit.train.registry import Registry, did_you_mean

ConfigT = TypeVar("ConfigT", GptConfig, LstmConfig, ResnetConfig)


def _configure(
    name: str, kind: type[ConfigT], settings: Mapping[str, object], arguments: Mapping[str, object]
) -> ConfigT:
    """Make the config from the preset and the data's facts, overridden by the user's arguments."""
    types = {field.name: {"int": int, "float": float}[str(field.type)] for field in fields(kind)}
    for key, value in arguments.items():
        if key not in types:
            raise UnsupportedInput(
                f"the model {name!r} has no setting {key!r}.{did_you_mean(key, types)} "
                f"--model-args takes: {', '.join(types)}."
            )
        allowed = (int, float) if types[key] is float else (int,)
        if isinstance(value, bool) or not isinstance(value, allowed) or value < 0:
            raise UnsupportedInput(
                f"--model-args {key}={value} does not fit the model {name!r}. "
                f"{key} must be a non-negative {types[key].__name__}."
            )
    return kind(**{**settings, **arguments})  # type: ignore[arg-type]  # checked against the fields


def _gpt(name: str, summary: str, **preset: int) -> ModelSource:
    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        known = {**preset, "vocabulary_size": facts.vocabulary_size, "sequence_length": sequence_length}
        return BuiltModel(Gpt(_configure(name, GptConfig, known, arguments)), None)

    return ModelSource(
        name=name,
        summary=f"text · {summary}",
        accepts=("text",),
        build=build,
        default_dataset="python-source",
        sequence_length=preset["sequence_length"],
    )


def _resnet(name: str, summary: str, **preset: int) -> ModelSource:
    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        known = {**preset, "channels": facts.channels, "classes": facts.classes}
        return BuiltModel(Resnet(_configure(name, ResnetConfig, known, arguments)), None)

    return ModelSource(
        name=name, summary=f"images · {summary}", accepts=("images",), build=build, default_dataset="digits"
    )


def _lstm(name: str, summary: str, *, sequence_length: int, **preset: int) -> ModelSource:
    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        known = {**preset, "features": facts.features, "vocabulary_size": facts.vocabulary_size}
        return BuiltModel(Lstm(_configure(name, LstmConfig, known, arguments)), None)

    return ModelSource(
        name=name,
        summary=f"series, text · {summary}",
        accepts=("series", "text"),
        build=build,
        default_dataset="co2",
        sequence_length=sequence_length,
    )


MODELS: Registry[ModelSource] = Registry(
    "model",
    {
        source.name: source
        for source in (
            _gpt("gpt", "causal transformer, 6 blocks of width 128", width=128, layers=6, heads=4, sequence_length=256),
            _gpt(
                "gpt-tiny", "causal transformer, 2 blocks of width 32", width=32, layers=2, heads=2, sequence_length=64
            ),
            _resnet("resnet", "ResNet-20 for small images", width=16, blocks=3),
            _resnet(
                "resnet-tiny", "residual network for small images, one block per stage, width 8", width=8, blocks=1
            ),
            _lstm("lstm", "2 recurrent layers of width 128", width=128, layers=2, sequence_length=104),
            _lstm("lstm-tiny", "1 recurrent layer of width 16", width=16, layers=1, sequence_length=26),
        )
    },
    "or give transformers:CONFIG.json, or package.module:factory",
)
