"""``transformers:CONFIG.json``: a model of the transformers library, from files on this machine. Nothing is downloaded.

The only place in the package that imports transformers, and only when such a model is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from recollect.errors import UnsupportedInput
from recollect.train.data.facts import DataFacts, Kind
from recollect.train.models.source import BuiltModel, ModelSource

TransformersTask = Literal["causal-lm", "image-classification"]

#: The class that builds a model for the task, and the data that it is trained on.
TASKS: dict[TransformersTask, tuple[str, Kind]] = {
    "causal-lm": ("AutoModelForCausalLM", "text"),
    "image-classification": ("AutoModelForImageClassification", "images"),
}

# How the names of the classes end that are trained on each kind of data.
_ENDINGS: dict[str, Kind] = {"ForCausalLM": "text", "LMHeadModel": "text", "ForImageClassification": "images"}

_DEFAULT_SEQUENCE_LENGTH = 256


def transformers_source(spec: str, task: TransformersTask | None) -> ModelSource:
    """The model that ``transformers:FILE_OR_FOLDER`` describes; its config is read and judged at once."""
    transformers = _import_transformers(spec)
    path = Path(spec.partition(":")[2])
    config = _read_config(transformers, path)
    class_name, kind = _choose_class(transformers, path, config, task)
    longest = getattr(config, "max_position_embeddings", None)

    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        for key, value in arguments.items():
            if not hasattr(config, key):
                raise UnsupportedInput(
                    f"the config {path} has no attribute {key!r}, which --model-args sets. "
                    f"Use the names that {type(config).__name__} has."
                )
            setattr(config, key, value)
        _check_fit(path, config, facts, sequence_length)
        return BuiltModel(_make(transformers, class_name, path, config), None)

    return ModelSource(
        name=spec,
        summary=f"{class_name} from {path}",
        accepts=(kind,),
        build=build,
        default_dataset="python-source" if kind == "text" else "digits",
        sequence_length=min(longest, _DEFAULT_SEQUENCE_LENGTH)
        if isinstance(longest, int)
        else _DEFAULT_SEQUENCE_LENGTH,
    )


def _import_transformers(spec: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UnsupportedInput(
            f"--model {spec} needs the transformers library, which is not installed. "
            f"Install it with: pip install 'recollect[transformers]'"
        ) from None
    return transformers


def _read_config(transformers: Any, path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedInput(
            f"there is no file {str(file)!r}, which --model transformers:... names. "
            f"Give a config.json of the transformers library, or a folder that holds one; nothing is downloaded."
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UnsupportedInput(
            f"{file} is not a config that transformers {transformers.__version__} can read: "
            f"{str(problem).strip().splitlines()[0]} Check the file, above all its model_type."
        ) from None


def _choose_class(transformers: Any, path: Path, config: Any, task: TransformersTask | None) -> tuple[str, Kind]:
    if task is not None:
        return TASKS[task]
    architectures = getattr(config, "architectures", None) or []
    if not architectures:
        raise UnsupportedInput(
            f"the config {path} has no `architectures`, so it does not say what its model is trained for. "
            f"Add --task, one of: {', '.join(TASKS)}."
        )
    class_name = str(architectures[0])
    kind = next((kind for ending, kind in _ENDINGS.items() if class_name.endswith(ending)), None)
    if kind is None or not hasattr(transformers, class_name):
        raise UnsupportedInput(
            f"the config {path} names the architecture {class_name}, for which there is no loss and data here. "
            f"Give --task, one of {', '.join(TASKS)}, or write a package.module:factory that returns the model and its "
            f"loss."
        )
    return class_name, kind


def _check_fit(path: Path, config: Any, facts: DataFacts, sequence_length: int) -> None:
    """Compare the config with the data. What does not fit is an error that names the setting."""
    wanted: dict[str, int] = {}
    if facts.kind == "images":
        wanted = {"num_channels": facts.channels, "num_labels": facts.classes, "image_size": facts.image_size}
    wrong = {
        key: value
        for key, value in wanted.items()
        if isinstance(getattr(config, key, None), int) and getattr(config, key) != value
    }
    if wrong:
        raise UnsupportedInput(
            f"the config {path} does not fit the images: it has "
            f"{', '.join(f'{key}={getattr(config, key)}' for key in wrong)}. "
            f"Set --model-args {' '.join(f'{key}={value}' for key, value in wrong.items())}."
        )
    vocabulary_size = getattr(config, "vocab_size", None)
    if isinstance(vocabulary_size, int) and vocabulary_size < facts.vocabulary_size:
        raise UnsupportedInput(
            f"the config {path} has vocab_size={vocabulary_size}, but the text has {facts.vocabulary_size} different "
            f"tokens. Set --model-args vocab_size={facts.vocabulary_size}."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if facts.kind == "text" and isinstance(longest, int) and longest < sequence_length:
        raise UnsupportedInput(
            f"the config {path} allows {longest} positions, but the sequences have {sequence_length}. "
            f"Give --sequence-length {longest}."
        )


def _make(transformers: Any, class_name: str, path: Path, config: Any) -> nn.Module:
    model_class = getattr(transformers, class_name)
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    if has_weights:
        made = model_class.from_pretrained(str(path), config=config, local_files_only=True)
    elif class_name.startswith("Auto"):
        made = model_class.from_config(config)
    else:
        made = model_class(config)
    model: nn.Module = made
    return model.train()
