"""What tightfit uses of FSDP2's inside (`torch.distributed.fsdp.fully_shard`), each with the reason.

Seen working in PyTorch 2.11 and 2.13.  FSDP2 has no public way to ask which modules it has wrapped and how, to copy
such a model, or to hear when it gathers weights and lets them go; all of that decides how much memory a step takes.

Nothing here imports FSDP2 before the user did: a model without it costs one look at `sys.modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

from tightfit.errors import UnsupportedInput

#: Settings of a group of parameters that `fully_shard` is not given, but methods of the module are.
_SETTINGS = (
    "reduce_grads", "all_reduce_grads", "reshard_after_backward", "unshard_async_op", "unshard_in_backward",
    "reduce_scatter_max_input_buffers", "reduce_scatter_unused_params", "gradient_divide_factor",
    "force_sum_reduction_for_comms",
)  # fmt: skip
_PACKAGE = "torch.distributed.fsdp"


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, outer ones first."""
    return [module for module in model.modules() if _is_sharded_kind(type(module))] if _PACKAGE in sys.modules else []


def unsharded_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The module's class as it was before `fully_shard`, which puts a subclass in its place."""
    kind = type(module)
    if not _is_sharded_kind(kind):
        return kind
    place: int = getattr(kind, "_orig_cls_mro_index", 2)
    original: type[torch.nn.Module] = kind.__mro__[place]
    return original


def _is_sharded_kind(kind: type) -> bool:
    """Whether `fully_shard` made this class."""
    base = getattr(sys.modules.get(_PACKAGE), "FSDPModule", None)
    return base is not None and issubclass(kind, base)


def mesh_process_group(model: torch.nn.Module) -> Any:
    """The processes that share the model's parameters; None for a model that is not sharded."""
    for group in _groups(model):
        mesh = group.mesh_info.mesh
        return mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD
    return None


def ensure_sharded(model: torch.nn.Module) -> None:
    """Have FSDP2 decide which module is the root; let go of weights that a forward without backward left gathered."""
    modules = sharded_modules(model)
    for module in modules:
        module._get_fsdp_state()._lazy_init()
    for module in modules:
        module.reshard()


def _states(model: torch.nn.Module) -> list[Any]:
    """FSDP2's state of each call of `fully_shard`, outer ones first."""
    found = {id(state): state for state in (module._get_fsdp_state() for module in sharded_modules(model))}
    return list(found.values())


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _groups(model: torch.nn.Module) -> list[Any]:
    return [group for state in _states(model) for group in _groups_of(state)]


# ---------------------------------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class UnshardedParameter:
    """A parameter that this process holds a part of, described as the whole."""

    tensors: tuple[torch.Tensor, ...]
    """Everything that stands for it in the model."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def unsharded_parameters(model: torch.nn.Module) -> list[UnshardedParameter]:
    """The sharded parameters of the model."""
    found = []
    for group in _groups(model):
        for one in group.fsdp_params:
            tensors = [one.sharded_param]
            if hasattr(one, "_unsharded_param"):
                tensors.append(one._unsharded_param)
            found.append(
                UnshardedParameter(
                    tensors=tuple(tensors),
                    shape=one._orig_size,
                    dtype=one.sharded_param.dtype,
                    device=group.device,
                    requires_grad=one.sharded_param.requires_grad,
                )
            )
    return found


def unsharded_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a sharded module, without FSDP2's state and hooks: what a copy shall have.

    (`fully_shard` forbids `copy.deepcopy`, because its state cannot be copied.)
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    attributes = {name: value for name, value in vars(module).items() if name not in (REGISTRY_KEY, STATE_KEY)}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = attributes[name]
        attributes[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_own(hook))
    for name in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        attributes[name] = type(attributes[name])()
    return attributes


def shard_copy(model: torch.nn.Module, copies: Mapping[int, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Shard a copy as the model is sharded.

    Args:
        model: a sharded model.
        copies: of its modules and parameters, by the id of what was copied.

    Returns:
        Each sharded parameter of the model, and the copy's.

    Raises:
        UnsupportedInput: the model is sharded in a way that is not known here.
    """
    from torch.distributed.fsdp import fully_shard

    _refuse_unknown(model)
    states = _states(model)
    managed = {id(tensor) for whole in unsharded_parameters(model) for tensor in whole.tensors}
    ignored = {copies[id(p)] for p in model.parameters() if id(p) not in managed}
    mesh = next(iter(_groups(model))).mesh_info.mesh
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    copied_state: dict[int, Any] = {}
    for state in reversed(states):  # inner ones first
        modules = [copies[id(module)] for module in state._modules]
        fully_shard(modules if len(modules) > 1 else modules[0], ignored_params=ignored, **_options(state, mesh))
        copied_state[id(state)] = mine = modules[0]._get_fsdp_state()
        for group, copied in zip(_groups_of(state), _groups_of(mine), strict=True):
            for name in _SETTINGS:
                if hasattr(group, name):
                    setattr(copied, name, getattr(group, name))
            pairs += [
                (one.sharded_param, other.sharded_param)
                for one, other in zip(group.fsdp_params, copied.fsdp_params, strict=True)
            ]
    for state in states:
        for name in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
            setattr(copied_state[id(state)], name, [copied_state[id(other)] for other in getattr(state, name)])
    return pairs


def _options(state: Any, mesh: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": state._mp_policy}
    for group in _groups_of(state):
        after = group.post_forward_mesh_info
        reshards: bool | int | None = after is not None
        if after is not None and after != group.mesh_info:
            reshards = after.shard_mesh_size
        options |= {
            "mesh": group.mesh_info.mesh,
            "offload_policy": group.offload_policy,
            "reshard_after_forward": None if state._auto_reshard_after_forward else reshards,
        }
    return options


def _refuse_unknown(model: torch.nn.Module) -> None:
    for state in _states(model):
        groups = _groups_of(state)
        parameters = [one for group in groups for one in group.fsdp_params]
        if len(groups) > 1 or any(one.is_dtensor or one.fsdp_placement.dim != 0 for one in parameters):
            raise UnsupportedInput(
                "the model is sharded by fully_shard along another dimension than the first, or together with another "
                "kind of parallelism (tensor or expert parallelism), so what a step holds cannot be foreseen yet. "
                "Shard it by fully_shard(module, mesh=...) alone, or train it without a budget."
            )


# ---------------------------------------------------------------------------------------------------- watching


def wrap_fsdp_hooks(model: torch.nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    """Have everything that FSDP2 does around forwards and in backward happen inside a context.

    Returns:
        What takes the contexts away again.
    """
    undo: list[Callable[[], None]] = []
    for module in sharded_modules(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if _is_own(hook):
                    hooks[key] = _inside(around, hook)
                    undo.append(_putting_back(hooks, key, hook))
    for state in _states(model):
        for name in ("_pre_backward", "_root_post_backward_final_callback"):
            undo.append(_override(state, name, _inside(around, getattr(state, name))))
        for group in _groups_of(state):
            undo.append(_override(group, "post_backward", _inside(around, group.post_backward)))

    def take_away() -> None:
        for one in undo:
            one()

    return take_away


def on_storage_resize(model: torch.nn.Module, resized: Callable[[torch.Tensor], None]) -> None:
    """Have `resized` called with each tensor whose memory FSDP2 has just given back, or taken anew, in place."""

    def tell_of(parameters: list[Any]) -> None:
        for one in parameters:
            for tensor in one.all_gather_outputs:
                resized(tensor)

    for group in _groups(model):
        # In a group of one process, weights are not gathered but copied, by other means.
        name = "wait_for_unshard"
        _override(group, name, _then(getattr(group, name), partial(tell_of, group.fsdp_params)))
        for one in group.fsdp_params:
            for name in ("alloc_all_gather_outputs", "free_unsharded_param"):
                _override(one, name, _then(getattr(one, name), partial(tell_of, [one])))


def after_backward(model: torch.nn.Module, call: Callable[[], None]) -> None:
    """Have `call` called at the end of each backward."""
    name = "_root_post_backward_final_callback"
    for state in _states(model):
        _override(state, name, _then(getattr(state, name), call))


def unshard_once(model: torch.nn.Module) -> list[torch.Tensor]:
    """Gather all weights one after the other and let them go, as every step but the first finds them; the tensors in
    which they will be gathered, now without memory.
    """
    ensure_sharded(model)
    for module in sharded_modules(model):
        module.unshard()
        module.reshard()
    return [tensor for one in _parameters(model) for tensor in one.all_gather_outputs]


def use_collectives(model: torch.nn.Module, all_gather: Any, reduce_scatter: Any) -> None:
    """Use these instead of the process group's collectives; see `torch.distributed.fsdp`'s own protocols for them."""
    for group in _groups(model):
        group._all_gather_comm = all_gather
        group._reduce_scatter_comm = reduce_scatter


def _parameters(model: torch.nn.Module) -> Iterator[Any]:
    for group in _groups(model):
        yield from group.fsdp_params


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_PACKAGE)


def _inside(around: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with around():
            return call(*args, **kwargs)

    return inside


def _then(call: Callable[[], None], further: Callable[[], None]) -> Callable[[], None]:
    def then() -> None:
        call()
        further()

    return then


def _override(thing: Any, name: str, value: Any) -> Callable[[], None]:
    """Shadow a method of one object."""
    setattr(thing, name, value)
    return lambda: vars(thing).pop(name, None) and None


def _putting_back(hooks: Any, key: int, hook: Any) -> Callable[[], None]:
    def put_back() -> None:
        if key in hooks:
            hooks[key] = hook

    return put_back
