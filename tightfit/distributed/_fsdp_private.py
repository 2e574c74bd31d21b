"""Every private API of FSDP2 (`torch.distributed.fsdp.fully_shard`) that tightfit uses, each with the reason.

Tested with PyTorch 2.11 and 2.13.  FSDP2 has no public way to ask which modules it has sharded and how, to copy such a
model, or to be called when it all-gathers weights and frees them.  All of that decides how much memory a step takes.

Nothing here imports FSDP2 before the user did: a model without it costs one look at `sys.modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

from tightfit.errors import UnsupportedInput

#: Settings of a parameter group that are no arguments of `fully_shard`: methods of the module set them.
_SETTINGS = (
    "reduce_grads", "all_reduce_grads", "reshard_after_backward", "unshard_async_op", "unshard_in_backward",
    "reduce_scatter_max_input_buffers", "reduce_scatter_unused_params", "gradient_divide_factor",
    "force_sum_reduction_for_comms",
)  # fmt: skip
_PACKAGE = "torch.distributed.fsdp"


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on, outer ones first."""
    return [module for module in model.modules() if _is_fsdp_class(type(module))] if _PACKAGE in sys.modules else []


def modules_of_unit(module: Any) -> list[torch.nn.Module]:
    """Return the modules that were given to the same call of `fully_shard` as this one."""
    return list(module._get_fsdp_state()._modules)


def unsharded_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the module's class from before `fully_shard`, which replaces it by a subclass."""
    cls = type(module)
    if not _is_fsdp_class(cls):
        return cls
    position: int = getattr(cls, "_orig_cls_mro_index", 2)
    original: type[torch.nn.Module] = cls.__mro__[position]
    return original


def _is_fsdp_class(cls: type) -> bool:
    """Tell whether `fully_shard` made this class."""
    base = getattr(sys.modules.get(_PACKAGE), "FSDPModule", None)
    return base is not None and issubclass(cls, base)


def mesh_process_group(model: torch.nn.Module) -> Any:
    """Return the `torch.distributed` group that the parameters are sharded over; None if they are not sharded."""
    for group in _groups(model):
        mesh = group.mesh_info.mesh
        return mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD
    return None


def ensure_sharded(model: torch.nn.Module) -> None:
    """Finish FSDP2's lazy initialisation, which finds the root, and reshard every module.

    A forward without backward leaves weights unsharded.
    """
    modules = sharded_modules(model)
    for module in modules:
        module._get_fsdp_state()._lazy_init()
    for module in modules:
        module.reshard()


def forget_iteration(model: torch.nn.Module) -> None:
    """Have FSDP2 forget a forward or backward that an error has ended, and reshard every module.

    Else it waits for the end of that backward, and no later one is reduced.
    """
    for state in _states(model):
        state._lazy_init()
    for state in _states(model):
        if state._is_root:
            _reset(state)
    for param in _parameters(model):
        param.unsharded_accumulated_grad = None
        if hasattr(param, "_unsharded_param"):
            param._unsharded_param.grad = None


def _reset(root: Any) -> None:
    if hasattr(root, "_reset_iter_state"):  # from PyTorch 2.13 on
        root._reset_iter_state()
        return
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    for state in root._state_ctx.all_states:
        state._training_state = type(state._training_state).IDLE
        for group in _groups_of(state):
            group._training_state = type(group._training_state).IDLE
            group.finalize_backward()
            group._to_sharded()


@contextmanager
def reducing_each_backward(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every backward reduces its gradients, and finds none that wait for the next one to do so.

    A loop that accumulates lets the first backwards of a step not reduce (`set_requires_gradient_sync`), and may call
    `fit` there.
    """
    groups = _groups(model)
    settings = [group.reduce_grads for group in groups]
    waiting = [(param, param.unsharded_accumulated_grad, _unsharded_grad(param)) for param in _parameters(model)]
    for group in groups:
        group.reduce_grads = True
    for param, _, _ in waiting:
        _put_grads(param, None, None)
    try:
        yield
    finally:
        for group, reduces in zip(groups, settings, strict=True):
            group.reduce_grads = reduces
        for param, accumulated, grad in waiting:
            _put_grads(param, accumulated, grad)


def _unsharded_grad(param: Any) -> Any:
    return param._unsharded_param.grad if hasattr(param, "_unsharded_param") else None


def _put_grads(param: Any, accumulated: Any, grad: Any) -> None:
    param.unsharded_accumulated_grad = accumulated
    if hasattr(param, "_unsharded_param"):
        param._unsharded_param.grad = grad


def _states(model: torch.nn.Module) -> list[Any]:
    """Return FSDP2's state of each call of `fully_shard`, outer ones first."""
    states = {id(state): state for state in (module._get_fsdp_state() for module in sharded_modules(model))}
    return list(states.values())


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
    """A sharded parameter, described as it was before sharding."""

    tensors: tuple[torch.Tensor, ...]
    """The tensors that stand for it in the model: its shard and, if made already, the unsharded parameter."""
    shape: torch.Size
    """Of the unsharded parameter."""
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def unsharded_parameters(model: torch.nn.Module) -> list[UnshardedParameter]:
    """Describe each sharded parameter of the model."""
    parameters = []
    for group in _groups(model):
        for param in group.fsdp_params:
            tensors = [param.sharded_param]
            if hasattr(param, "_unsharded_param"):
                tensors.append(param._unsharded_param)
            parameters.append(
                UnshardedParameter(
                    tensors=tuple(tensors),
                    shape=param._orig_size,
                    dtype=param.sharded_param.dtype,
                    device=group.device,
                    requires_grad=param.sharded_param.requires_grad,
                )
            )
    return parameters


def unsharded_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Return a sharded module's attributes without FSDP2's state and hooks, for a copy of the module.

    `fully_shard` forbids `copy.deepcopy`, because its state cannot be copied.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    attributes = {name: value for name, value in vars(module).items() if name not in (REGISTRY_KEY, STATE_KEY)}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = attributes[name]
        attributes[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp_hook(hook))
    for name in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        attributes[name] = type(attributes[name])()
    return attributes


def shard_copy(model: torch.nn.Module, copies: Mapping[int, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Shard an unsharded copy of the model in the way that the model is sharded.

    Args:
        model: a sharded model.
        copies: the copies of its modules and parameters, by the id of the original.

    Returns:
        Pairs of each sharded parameter of the model and the same parameter of the copy.

    Raises:
        UnsupportedInput: the model is sharded along another dimension, or combined with another kind of parallelism.
    """
    from torch.distributed.fsdp import fully_shard

    _refuse_unknown(model)
    states = _states(model)
    managed = {id(tensor) for parameter in unsharded_parameters(model) for tensor in parameter.tensors}
    ignored = {copies[id(p)] for p in model.parameters() if id(p) not in managed}
    mesh = next(iter(_groups(model))).mesh_info.mesh
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    copied_state: dict[int, Any] = {}
    for state in reversed(states):  # inner ones first
        modules = [copies[id(module)] for module in state._modules]
        fully_shard(modules if len(modules) > 1 else modules[0], ignored_params=ignored, **_options(state, mesh))
        copied_state[id(state)] = new_state = modules[0]._get_fsdp_state()
        for group, copied in zip(_groups_of(state), _groups_of(new_state), strict=True):
            for name in _SETTINGS:
                if hasattr(group, name):
                    setattr(copied, name, getattr(group, name))
            pairs += [
                (original.sharded_param, copy.sharded_param)
                for original, copy in zip(group.fsdp_params, copied.fsdp_params, strict=True)
            ]
    for state in states:
        for name in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
            setattr(copied_state[id(state)], name, [copied_state[id(other)] for other in getattr(state, name)])
    return pairs


def _options(state: Any, mesh: Any) -> dict[str, Any]:
    """Recover the arguments of the `fully_shard` call that made this state."""
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
        params = [param for group in groups for param in group.fsdp_params]
        if len(groups) > 1 or any(param.is_dtensor or param.fsdp_placement.dim != 0 for param in params):
            raise UnsupportedInput(
                "the model is sharded by fully_shard along another dimension than the first, or together with another "
                "kind of parallelism (tensor or expert parallelism), so the memory of a step cannot be predicted yet. "
                "Shard it by fully_shard(module, mesh=...) alone, or train it without a budget."
            )


def place_copy(model: torch.nn.Module, device: torch.device) -> None:
    """Let a sharded copy gather and reduce on another device than its mesh names, without data there.

    FSDP2 allocates on the mesh's device, and refuses parameters without data at first.  Call it inside
    `device.described.operations.as_on`.
    """
    for state in _states(model):
        state._device = device
        for group in _groups_of(state):
            group.device = device
            group._validate_no_meta_params = lambda: None
            for param in group.fsdp_params:
                param.device = device


def store_of_nobody() -> Any:
    """Return the store of PyTorch's ``fake`` backend, which its own tests use; importing it registers the backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


# ---------------------------------------------------------------------------------------------------- hooks


def wrap_fsdp_hooks(model: torch.nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    """Run FSDP2's own ops (all-gathers, reduction of gradients), around forwards and in backward, inside a context.

    Returns:
        A function that removes the contexts again.
    """
    undo: list[Callable[[], None]] = []
    for module in sharded_modules(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if _is_fsdp_hook(hook):
                    hooks[key] = _inside(context, hook)
                    undo.append(_restore_hook(hooks, key, hook))
    for state in _states(model):
        for name in ("_pre_backward", "_root_post_backward_final_callback"):
            undo.append(_override(state, name, _inside(context, getattr(state, name))))
        for group in _groups_of(state):
            undo.append(_override(group, "post_backward", _inside(context, group.post_backward)))

    def remove() -> None:
        for restore in undo:
            restore()

    return remove


def on_storage_resize(model: torch.nn.Module, resized: Callable[[torch.Tensor], None]) -> None:
    """Call `resized` with each all-gather output whose storage FSDP2 has just allocated or freed in place."""

    def report(parameters: list[Any]) -> None:
        for parameter in parameters:
            for tensor in parameter.all_gather_outputs:
                resized(tensor)

    for group in _groups(model):
        # With one process, FSDP2 copies weights instead of gathering them, on another code path.
        name = "wait_for_unshard"
        _override(group, name, _then(getattr(group, name), partial(report, group.fsdp_params)))
        for parameter in group.fsdp_params:
            for name in ("alloc_all_gather_outputs", "free_unsharded_param"):
                _override(parameter, name, _then(getattr(parameter, name), partial(report, [parameter])))


def after_backward(model: torch.nn.Module, call: Callable[[], None]) -> None:
    """Call `call` at the end of each backward."""
    name = "_root_post_backward_final_callback"
    for state in _states(model):
        _override(state, name, _then(getattr(state, name), call))


def unshard_once(model: torch.nn.Module) -> list[torch.Tensor]:
    """Unshard and reshard each unit once, so that the state is that of every step but the first.

    Returns:
        The tensors that all-gathers write to. Their storages are empty now.
    """
    ensure_sharded(model)
    for module in sharded_modules(model):
        module.unshard()
        module.reshard()
    return [tensor for parameter in _parameters(model) for tensor in parameter.all_gather_outputs]


def use_collectives(model: torch.nn.Module, all_gather: Any, reduce_scatter: Any) -> None:
    """Replace the process group's collectives; `torch.distributed.fsdp` defines the protocols of both."""
    for group in _groups(model):
        group._all_gather_comm = all_gather
        group._reduce_scatter_comm = reduce_scatter


def _parameters(model: torch.nn.Module) -> Iterator[Any]:
    for group in _groups(model):
        yield from group.fsdp_params


def _is_fsdp_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_PACKAGE)


def _inside(context: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with context():
            return call(*args, **kwargs)

    return inside


def _then(call: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    def then() -> None:
        call()
        after()

    return then


def _override(thing: Any, name: str, value: Any) -> Callable[[], None]:
    """Override a method of one object; return a function that undoes it."""
    setattr(thing, name, value)
    return lambda: vars(thing).pop(name, None) and None


def _restore_hook(hooks: Any, key: int, hook: Any) -> Callable[[], None]:
    def restore() -> None:
        if key in hooks:
            hooks[key] = hook

    return restore
