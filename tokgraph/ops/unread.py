"""An operator that holds each batch to what was shown of all batches alike: rows that are gone are not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokgraph.errors import Where

from .base import NAMESPACE, Condition, require

READS_HELP = (
    "correct reads=, or let the loss leave such positions out: by the ignore index as label, or a weight of 0 that is "
    "computed from the task's inputs"
)

_READ = (
    "the loss reads a position that the task's reads= rules out (neither is its label the ignore index there, nor its "
    "weight 0)"
)


def _check_unread(x: Tensor, unread: Tensor, node: str, op: str, module: str, source: str) -> Tensor:
    return x.clone()


@torch.library.custom_op(f"{NAMESPACE}::check_unread", mutates_args=())
def check_unread(x: Tensor, unread: Tensor, node: str, op: str, module: str, source: str) -> Tensor:
    """``x``, of a batch of which a reader leaves out all rows that may be gone.

    Args:
        x: what is passed on: the loss.
        unread: bool, true where the reader does not read a row, or the row is demanded.
        node: the reader's name in the graph.
        op: its operator.
        module: the module that calls it, ``""`` for none.
        source: the line that calls it, ``""`` where it is not known.

    Raises:
        BatchError: the reader reads a row that the task's ``reads=`` rules out.
    """
    require(
        unread.all(),
        _READ,
        where=Where(node, op, module or None, source or None),
        help=READS_HELP,
    )
    return _check_unread(x, unread, node, op, module, source)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


check_unread.register_fake(_check_unread)
check_unread.register_autograd(lambda ctx, grad: (grad, *(None,) * 5), setup_context=_setup)

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {torch.ops.tokgraph.check_unread.default: _check_unread}
"""Operator -> the plain ATen function it is."""
CONDITIONS = {torch.ops.tokgraph.check_unread.default: Condition(lambda x, unread, *_: unread.all(), lambda *_: _READ)}
"""Operator -> what it asks of a batch."""
