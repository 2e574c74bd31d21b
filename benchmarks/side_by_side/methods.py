"""The methods, each applied to a family's model as its documentation tells its users to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.side_by_side.families import Family

aten = torch.ops.aten


@dataclass(frozen=True)
class Method:
    """One way to train, with its parameter: a row of the tables."""

    name: str
    parameter: str = ""
    backend: str = "eager"
    """"eager", or which plain step it is compared to."""
    value: Any = None
    """The parameter, as `install` wants it."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.parameter}".strip()


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_forward(model: nn.Module, paths: tuple[str, ...], wrapper: Wrapper) -> None:
    """Replace the forward of the modules at these paths."""
    for path in paths:
        module = model.get_submodule(path)
        module.forward = wrapper(module.forward)


def checkpointed(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.utils.checkpoint` around a forward."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return call


def every_kth(family: Family, k: int) -> None:
    """`torch.utils.checkpoint` on blocks 0, k, 2k, ..."""
    wrap_forward(family.model, family.blocks[::k], checkpointed)


def transformers_every_kth(family: Family, k: int) -> None:
    """Hugging Face's switch."""
    family.model.activation_checkpointing_enable(every_n_layers=k)


#: What torchtitan's op-list policy saves, with the names that the same operations have on a CPU.
SAVED_OPS = frozenset(
    getattr(aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
    )
)
_MATMULS = frozenset({aten.mm.default, aten.addmm.default})


class OpList:
    """A selective policy: the results of expensive operations are saved, but of every second matmul only if `all_mm`.

    torchtitan recomputes every second matmul; saving all of them costs more memory and less time.
    """

    def __init__(self, all_mm: bool) -> None:
        self._all_mm = all_mm
        self._seen = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS and not self._all_mm:
            self._seen[context.is_recompute] += 1
            if self._seen[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def op_list(family: Family, all_mm: bool) -> None:
    """Selective checkpointing of every block by a list of operations."""
    wrap_forward(
        family.model,
        family.blocks,
        lambda forward: checkpointed(forward, context_fn=lambda: create_selective_checkpoint_contexts(OpList(all_mm))),
    )


def by_sac_ilp(family: Family, decisions: dict[str, list[int] | None]) -> None:
    """What PyTorch's integer programme decided for this budget: by module path, the operations to save (None: none)."""

    class Policy:
        def __init__(self, saved: list[int]) -> None:
            self._saved, self._seen = saved, {False: 0, True: 0}

        def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP

            if op in OPS_TO_ALWAYS_SKIP:
                return CheckpointPolicy.PREFER_RECOMPUTE
            place = self._seen[context.is_recompute]
            self._seen[context.is_recompute] += 1
            saved = place < len(self._saved) and self._saved[place]
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts(saved: list[int]) -> Any:
        return create_selective_checkpoint_contexts(Policy(saved))

    for path, saved in decisions.items():
        options: dict[str, Any] = {} if saved is None else {"context_fn": functools.partial(contexts, saved)}
        wrap_forward(family.model, (path,), functools.partial(checkpointed, **options))


def fairscale(family: Family, _: Any) -> None:
    """fairscale's wrapper on every block; it replaces the block's forward."""
    from fairscale.nn.checkpoint import checkpoint_wrapper

    for path in family.blocks:
        checkpoint_wrapper(family.model.get_submodule(path))


def deepspeed(family: Family, _: Any) -> None:
    """deepspeed's non-reentrant checkpoint on every block."""
    from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return non_reentrant_checkpoint(functools.partial(forward, **kwargs), *args)

        return call

    wrap_forward(family.model, family.blocks, wrapper)


class _RandomState:
    """What torch_remat asks for where a region draws random numbers."""

    def snapshot(self) -> torch.Tensor:
        return torch.get_rng_state()

    def restore(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


def remat_by_hand(family: Family, keep_attention: bool) -> None:
    """torch_remat in the GPT's blocks: all is run again, or all but attention."""
    import torch_remat

    for path in family.blocks:
        block = family.model.get_submodule(path)
        if keep_attention:
            attention = block.get_submodule("attention")
            attention.forward = torch_remat.region(attention.forward, "attention", recompute=False)
            for name in ("mlp_norm", "mlp"):  # what reads a kept result has to be a region, too
                part = block.get_submodule(name)
                part.forward = torch_remat.region(part.forward, name, recompute=True)
        block.forward = torch_remat.checkpoint(region_name=path, recompute_state_hooks=(_RandomState(),))(block.forward)


def compile_whole(family: Family, ratio: float) -> None:
    """`torch.compile` of the model with the partitioner's budget."""
    _compiler_settings(ratio)
    family.model.compile()


def compile_blocks(family: Family, ratio: float) -> None:
    """`torch.compile` of each block with the partitioner's budget."""
    _compiler_settings(ratio)
    for path in family.blocks:
        family.model.get_submodule(path).compile()


def _compiler_settings(ratio: float) -> None:
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.activation_memory_budget = ratio
    torch._inductor.config.fallback_random = True  # random numbers of eager PyTorch: else nothing could be compared
    torch._dynamo.config.cache_size_limit = 64


INSTALL: dict[str, Callable[[Family, Any], None]] = {
    "plain": lambda family, value: None,
    "checkpoint": every_kth,
    "transformers": transformers_every_kth,
    "op list": op_list,
    "sac_ilp": by_sac_ilp,
    "fairscale": fairscale,
    "deepspeed": deepspeed,
    "torch_remat": remat_by_hand,
    "compile whole": compile_whole,
    "compile blocks": compile_blocks,
}
