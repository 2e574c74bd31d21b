"""Follow the numbers of a batch through a run without data, as far as they are few, whole, and the batch's alone.

A model may branch on its input: on lengths, or on whether anything is padded.  Such numbers come from a few small
tensors (token ids, masks, lengths) by operations that no parameter has a part in.  Beside each such tensor without data
lies one with data, on the host, on which the same operation is run; `item()` is answered from it.

It may also branch on a number that it draws, as models do that can leave layers out in training ("layerdrop").  Where
every draw leads the same way, for the share of layers is 0, that way is known.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tightfit._torch_private.dispatch import LOCAL_SCALAR, below_autograd, find_overload, tree_map
from tightfit.device.tensor_parts import holds_data
from tightfit.operators.facts import describe, draws, mutated_tensors, result_tensors, tensors_in

_HOST = torch.device("cpu")

#: Draws from [0, 1); the least and the greatest that come of it; comparisons with a number, and their answers.
_UNIFORM = find_overload("aten.rand.default")
_DRAWN = 0.0, 1 - torch.finfo(torch.float32).eps / 2
_COMPARISONS = {find_overload(f"aten.{name}.Scalar"): getattr(operator, name) for name in ("lt", "le", "gt", "ge")}
_ANSWERS = {answer: torch.tensor(answer) for answer in (False, True)}

#: Of each such tensor, at most.
_MOST_BYTES = 2**24


class KnownValues:
    """What tensors without data would hold; given to `Observer`."""

    def __init__(self, without_data: Iterable[torch.Tensor], with_data: Iterable[torch.Tensor]) -> None:
        """Know what a batch holds: its tensors without data, and those that they stand for."""
        self._values = WeakTensorKeyDictionary()
        self._drawn = WeakTensorKeyDictionary()
        """Single numbers that were drawn, as keys."""
        for fake, real in zip(without_data, with_data, strict=True):
            if _is_followed(fake) and real.layout is torch.strided and holds_data(real):
                self._values[fake] = real.detach().to(_HOST, copy=True)

    def scalar(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return what `item()` gives; None for another operation, and for a tensor whose value is not known."""
        if func is not LOCAL_SCALAR or args[0] not in self._values:
            return None
        with below_autograd():
            return self._values[args[0]].item()

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Run an operation that was run without data, if what it reads is known; else forget what it wrote to."""
        if func is _UNIFORM and result.numel() == 1 and result.dtype is torch.float32:
            self._drawn[result] = True
        elif func in _COMPARISONS and args[0] in self._drawn:
            answers = {_COMPARISONS[func](number, args[1]) for number in _DRAWN}
            if len(answers) == 1:
                self._values[result] = _ANSWERS[answers.pop()]
                return
        info = describe(func)
        results = [one for one in result_tensors(result) if isinstance(one, torch.Tensor)]
        known = results and all(map(_is_followed, results)) and not draws(info, args, kwargs)
        if known and all(tensor in self._values for tensor in tensors_in((*args, *kwargs.values()))):
            try:
                with below_autograd():
                    found = func(*tree_map(self._with_data, args), **tree_map(self._with_data, kwargs))
            except Exception:  # a kernel that is for the device alone
                found = None
            values = list(result_tensors(found))
            if [one.shape for one in values] == [one.shape for one in results]:
                for one, value in zip(results, values, strict=True):
                    self._values[one] = value
                return
        for tensor in mutated_tensors(info, args, kwargs):
            self._forget(tensor)

    @contextmanager
    def taken_for_real(self) -> Iterator[None]:
        """Have transformers, which asks no tensor without data for its numbers, ask those whose numbers are known.

        What it asks others is about shapes; whole numbers that are not known keep the answer of a tensor without data.
        """
        asked = sys.modules.get("transformers.utils.import_utils")
        before = getattr(asked, "is_fake_tensor", None)
        if before is None:
            yield
            return

        def is_unknown(thing: Any) -> bool:
            is_fake: bool = before(thing)
            return is_fake and not (thing.is_floating_point() or thing in self._values)

        vars(asked)["is_fake_tensor"] = is_unknown
        try:
            yield
        finally:
            vars(asked)["is_fake_tensor"] = before

    def _with_data(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self._values[leaf]
        return _HOST if isinstance(leaf, torch.device) else leaf

    def _forget(self, tensor: torch.Tensor) -> None:
        """Forget what a tensor held, and its views."""
        if tensor in self._values:
            memory = self._values[tensor].untyped_storage().data_ptr()
            aliases = [one for one, value in self._values.items() if value.untyped_storage().data_ptr() == memory]
            for alias in aliases:
                del self._values[alias]


def _is_followed(tensor: torch.Tensor) -> bool:
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    return is_whole and tensor.layout is torch.strided and tensor.numel() * tensor.element_size() <= _MOST_BYTES
