"""Models: built-in ones by name, those of the transformers library, or a user's own factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts
from tightfit.train.factories import call_factory, import_factory
from tightfit.train.models.builtin import MODELS
from tightfit.train.models.from_transformers import TASKS, TransformersTask, transformers_source
from tightfit.train.models.source import BuiltModel, Loss, ModelSource, TaskName

__all__ = ["MODELS", "TASKS", "BuiltModel", "Loss", "ModelSource", "TaskName", "TransformersTask", "find_model"]

_PREFIX = "transformers:"


def find_model(spec: str, task: TransformersTask | None) -> ModelSource:
    """Find what ``spec`` names: a known name, ``transformers:CONFIG.json``, or ``package.module:factory``.

    Raises:
        UnsupportedInput: nothing of this name.
    """
    if spec.startswith(_PREFIX):
        return transformers_source(spec, task)
    if task is not None:
        raise UnsupportedInput(
            f"--task {task} was given, but only a transformers: config can need it, not the model {spec!r}. "
            f"Leave --task out."
        )
    if ":" in spec:
        return ModelSource(name=spec, summary=f"made by {spec}", accepts=(), build=_factory_builder(spec))
    return MODELS[spec]


def _factory_builder(spec: str) -> Callable[[DataFacts, int, Mapping[str, object]], BuiltModel]:
    factory = import_factory(spec, flag="--model")

    def build(facts: DataFacts, sequence_length: int, arguments: Mapping[str, object]) -> BuiltModel:
        made = call_factory(factory, arguments, what=f"--model {spec}", arguments_flag="--model-args")
        module, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(module, nn.Module):
            raise UnsupportedInput(
                f"--model {spec} returned a {type(made).__name__}, not a model. "
                f"Return a torch.nn.Module, or a module and a loss: (module, loss)."
            )
        if loss is not None and not callable(loss):
            raise UnsupportedInput(
                f"--model {spec} returned a loss that is a {type(loss).__name__} and cannot be called. "
                f"Return (module, loss) with loss(model, batch) giving a scalar tensor."
            )
        return BuiltModel(module, loss)

    return build
