"""Buffers that a forward changes: bound anew, they are written; and what reads one reads it as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from tokgraph.errors import CaptureError, Where
from tokgraph.ir.node import is_write

aten = torch.ops.aten


@contextmanager
def rebound_buffers(model: nn.Module) -> Iterator[None]:
    """Let a forward that binds another tensor to a buffer's name (``self.ema = ...``) write the buffer instead.

    Torch's export loses such a binding. What reads the buffer later in the same forward reads the new tensor, as ever.

    Raises:
        CaptureError: the new tensor has another shape or type.
    """
    before = {path: (module, dict(module._buffers)) for path, module in model.named_modules()}
    yield
    for path, (module, buffers) in before.items():
        for name, old in buffers.items():
            new = module._buffers.get(name)
            if new is old:
                continue
            if old is None or new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
                raise CaptureError(
                    f"the forward binds a tensor of another shape or type to the buffer {name!r}",
                    where=Where(module=path or None),
                    help="write into the buffer (copy_), or keep such a value in a local variable",
                )
            with torch.no_grad():
                old.copy_(new)
            module._buffers[name] = old


def read_before_written(module: fx.GraphModule) -> None:
    """Let everything read a copy of what the graph writes at its end, and write values without history.

    A backward pass, or a second call before it, would else see the buffer as it is by then.
    """
    graph = module.graph
    written = [node for node in graph.nodes if is_write(node)]
    last = max(graph.find_nodes(op="placeholder"), default=None)
    for source in dict.fromkeys(node.args[0] for node in written):
        with graph.inserting_after(last if source.op == "placeholder" else source):
            copied = graph.call_function(aten.clone.default, (source,))
        copied.meta.update(source.meta)
        source.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied and user not in written)
    for node in written:
        value = node.args[1]
        with graph.inserting_before(node):
            plain = graph.call_function(aten.detach.default, (value,))
        plain.meta.update(value.meta)
        node.replace_all_uses_with(value)  # a forward that returns what it wrote returns the value, with its gradients
        node.replace_input_with(value, plain)
        node.meta.update({key: x for key, x in value.meta.items() if key in ("val", "nn_module_stack", "stack_trace")})
    if written:
        module.recompile()
