"""Questions about the running backward, answered from within it.

Autograd has no public way to ask. Its private functions are used in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import ref

import torch
from torch import nn
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

NO_BACKWARD = -1


def reaches(parameters: Iterable[nn.Parameter]) -> bool:
    """Returns whether the running backward gives one of these parameters a gradient. One that computes gradients of inputs only
    doesn't.

    True outside any backward.
    """
    if _run_number() == NO_BACKWARD:
        return True
    return any(_will_have_gradient(parameter) for parameter in parameters if parameter.requires_grad)


class BackwardRuns:
    """Notices that a backward raised and another one runs."""

    def __init__(self) -> None:
        self._ends: dict[int, ref[Callable[[], None]]] = {}

    def given_up(self) -> bool:
        """Returns, once, that a backward seen here earlier raised. Call it inside the running one."""
        number = _run_number()
        if number == NO_BACKWARD or number in self._ends:
            return False
        # A backward that raised has dropped its end without calling it; one that this one runs within still holds its own.
        unfinished = {other: end for other, end in self._ends.items() if end() is not None}
        raised = len(unfinished) < len(self._ends)

        def end() -> None:
            del self._ends[number]

        Variable._execution_engine.queue_callback(end)
        self._ends = unfinished | {number: ref(end)}
        return raised


def _run_number() -> int:
    """Returns the number of the running backward."""
    return torch._C._current_graph_task_id()


def _will_have_gradient(parameter: nn.Parameter) -> bool:
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    try:
        # Within an operator that a TorchDispatchMode watches, torch leaves autograd out, and the parameter would have no node.
        with torch._C._ForceDispatchKeyGuard(included, excluded - torch._C._dispatch_keys(parameter)):
            return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:
        # autograd.grad() asks for this very parameter's gradient.
        return True
