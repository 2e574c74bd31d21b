"""``transformers:CONFIG.json``: a model of the transformers library, from files on this machine. Nothing is downloaded.

The only place in the package that imports transformers, and only when such a model is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.errors import UnsupportedInput, first_line
from tightfit.train.data.dataset_info import DataFacts, Kind
from tightfit.train.models.source import BuiltModel, ModelSource

_log = logging.getLogger(__name__)

TransformersTask = Literal["causal-lm", "masked-lm", "sequence-classification", "seq2seq", "image-classification"]

#: The class that builds a model for the task, and the data that it is trained on.
TASKS: dict[TransformersTask, tuple[str, Kind]] = {
    "causal-lm": ("AutoModelForCausalLM", "text"),
    "masked-lm": ("AutoModelForMaskedLM", "text"),
    "sequence-classification": ("AutoModelForSequenceClassification", "labelled-text"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "text-pairs"),
    "image-classification": ("AutoModelForImageClassification", "images"),
}

# How the names of the classes end that are made for each task.
_ENDINGS: dict[str, TransformersTask] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForConditionalGeneration": "seq2seq",
    "ForImageClassification": "image-classification",
}
_USUAL_DATA: dict[Kind, str] = {"text": "python-source", "images": "digits"}

_DEFAULT_SEQUENCE_LENGTH = 256


def transformers_source(spec: str, task: TransformersTask | None) -> ModelSource:
    """Return the model that ``transformers:FILE_OR_FOLDER`` describes; its config is read and checked at once."""
    transformers = _import_transformers(spec)
    path = Path(spec.partition(":")[2])
    config = _read_config(transformers, path)
    class_name, task = _choose_class(transformers, path, config, task)
    kind = TASKS[task][1]
    longest = getattr(config, "max_position_embeddings", None)

    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        try:
            for key, value in arguments.items():
                if not hasattr(config, key):
                    raise UnsupportedInput(
                        f"the config {path} has no attribute {key!r}, which --model-args sets. "
                        f"Use the names that {type(config).__name__} has."
                    )
                setattr(config, key, value)
            _fit_classes(path, config, facts)
            _check_fit(path, config, facts, task, sequence_length)
            return BuiltModel(_make(transformers, class_name, path, config), None)
        except Exception as problem:
            if isinstance(problem, UnsupportedInput) or is_out_of_memory(problem):
                raise
            raise UnsupportedInput(
                f"{class_name} cannot be built from the config {path} ({type(problem).__name__}: "
                f"{first_line(problem)}). "
                f"Check what the config says, and --model-args."
            ) from problem

    return ModelSource(
        name=spec,
        summary=f"{class_name} from {path}",
        accepts=(kind,),
        build=build,
        task=task,
        folder=path if path.is_dir() else path.parent,
        default_dataset=_USUAL_DATA.get(kind, ""),
        sequence_length=min(longest, _DEFAULT_SEQUENCE_LENGTH)
        if isinstance(longest, int) and longest > 0
        else _DEFAULT_SEQUENCE_LENGTH,
    )


def _import_transformers(spec: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UnsupportedInput(
            f"--model {spec} needs the transformers library, which is not installed. "
            f"Install it with: pip install 'tightfit[transformers]'"
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
    except Exception as problem:  # each kind of config has checks of its own
        raise UnsupportedInput(
            f"{file} is not a config that transformers {transformers.__version__} can read: "
            f"{first_line(problem)} Check the file, above all its model_type."
        ) from None


def _choose_class(
    transformers: Any, path: Path, config: Any, task: TransformersTask | None
) -> tuple[str, TransformersTask]:
    if task is not None:
        return TASKS[task][0], task
    architectures = getattr(config, "architectures", None)
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise UnsupportedInput(
            f"the config {path} has no `architectures`, so it does not say what its model is trained for. "
            f"Add --task, one of: {', '.join(TASKS)}."
        )
    class_name = architectures[0]
    found = next((made_for for ending, made_for in _ENDINGS.items() if class_name.endswith(ending)), None)
    if found is None or not hasattr(transformers, class_name):
        raise UnsupportedInput(
            f"the config {path} names the architecture {class_name}, for which there is no loss and data here. "
            f"Give --task, one of {', '.join(TASKS)}, or write a package.module:factory that returns the model and its "
            f"loss."
        )
    return class_name, found


def _fit_classes(path: Path, config: Any, facts: DataFacts) -> None:
    """Give a newly made classifier as many classes as the data has, and the padding token."""
    if facts.kind == "labelled-text":
        if not _has_weights(path) and getattr(config, "num_labels", facts.classes) != facts.classes:
            config.num_labels = facts.classes
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = facts.padding


def _check_fit(path: Path, config: Any, facts: DataFacts, task: TransformersTask, sequence_length: int) -> None:
    """Raise `UnsupportedInput` if the config does not fit the data; the setting is named."""
    wanted: dict[str, int] = {}
    if facts.kind == "images":
        wanted = {"num_channels": facts.channels, "num_labels": facts.classes, "image_size": facts.image_size}
    elif facts.kind == "labelled-text":
        wanted = {"num_labels": facts.classes}
    wrong = {
        key: value
        for key, value in wanted.items()
        if isinstance(getattr(config, key, None), int) and getattr(config, key) != value
    }
    if wrong:
        raise UnsupportedInput(
            f"the config {path} does not fit the data: it has "
            f"{', '.join(f'{key}={getattr(config, key)}' for key in wrong)}. "
            f"Set --model-args {' '.join(f'{key}={value}' for key, value in wrong.items())}."
        )
    vocabulary_size = getattr(config, "vocab_size", None)
    needed = max(facts.vocabulary_size, facts.mask_token + 1 if task == "masked-lm" else 0)
    if isinstance(vocabulary_size, int) and vocabulary_size < needed:
        raise UnsupportedInput(
            f"the config {path} has vocab_size={vocabulary_size}, but the text has {needed} different tokens"
            f"{', the mask token included' if task == 'masked-lm' else ''}. "
            f"Set --model-args vocab_size={needed}."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if facts.vocabulary_size and isinstance(longest, int) and longest < sequence_length:
        raise UnsupportedInput(
            f"the config {path} allows {longest} positions, but the sequences have {sequence_length}. "
            f"Give --sequence-length {longest}."
        )


def _make(transformers: Any, class_name: str, path: Path, config: Any) -> nn.Module:
    model_class = getattr(transformers, class_name)
    if _has_weights(path):
        made = _load(model_class, path, config)
    elif class_name.startswith("Auto"):
        made = model_class.from_config(config)
    else:
        made = model_class(config)
    model: nn.Module = made
    return model.train()


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors"))


def _load(model_class: Any, path: Path, config: Any) -> nn.Module:
    try:
        made, notes = model_class.from_pretrained(
            str(path), config=config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=False
        )
    except (RuntimeError, ValueError, OSError) as problem:
        raise UnsupportedInput(
            f"the weights in {path} do not fit its config: {first_line(problem)} "
            f"Check that both are of one model, and --model-args."
        ) from None
    missing = sorted(notes["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        _log.warning(
            "%s holds no weights for %s, which begin at random: right for a new head, wrong for anything else",
            path,
            shown,
        )
    return made  # type: ignore[no-any-return]  # transformers is not annotated
