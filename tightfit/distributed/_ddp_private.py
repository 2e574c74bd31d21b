"""Every private API of DistributedDataParallel's reducer that tightfit uses, each with the reason.

Tested with PyTorch 2.13.  The reducer hangs a hook on each parameter's place in autograd's graph, which counts every
backward that reaches the parameter, whoever called forward.  There is no public way to let it forget one.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

#: Has more than its stubs say.
_dist: Any = torch.distributed


def is_learning_its_graph(wrapper: DistributedDataParallel) -> bool:
    """Tell whether the reducer takes the next backward for the one that shows a static graph."""
    return bool(wrapper.static_graph) and not wrapper._static_graph_delay_allreduce_enqueued


def renew_reducer(wrapper: DistributedDataParallel) -> None:
    """Give a wrapper, none of whose own backwards has run, a reducer that has seen none, as unpickling it does."""
    made: Any = wrapper
    builtin = _builtin_hook(wrapper)
    made.reducer._remove_autograd_hooks()
    parameters, expects_sparse = made._build_params_for_reducer()
    names = made._build_debug_param_to_name_mapping(parameters)
    made._ddp_init_helper(parameters, expects_sparse, names, made.static_graph)
    if made.static_graph:
        made.reducer._set_static_graph()
        made.logger._set_static_graph()
    for hook, state in made._comm_hooks:
        made.logger._set_comm_hook_name(hook.__qualname__)
        _dist._register_comm_hook(made.reducer, state, hook)
    if builtin is not None:
        made._register_builtin_comm_hook(builtin)


def _builtin_hook(wrapper: Any) -> Any:
    """Return the built-in communication hook, of which the wrapper itself keeps nothing but the name."""
    name = wrapper._get_ddp_logging_data().get("comm_hook", "")
    return next((kind for kind in _dist.BuiltinCommHookType.__members__.values() if str(kind) == name), None)


def forget_used_parameters(wrapper: DistributedDataParallel) -> None:
    """Let a reducer that looks for unused parameters, and waits for no backward, forget which it has seen used."""
    wrapper.reducer._reset_state()
