"""A compact, readable form of task graphs: one line a call, shapes in the user's dimension names, parameters by name."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from .node import module_path, tensor, value
from .program import TaskGraph
from .tensors import tensor_name

_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}


def format_graph(graph: TaskGraph) -> str:
    """The task's graph as text.

    ``%h2 = drop(%h, %rows)  # [batch, tokens - 8, 64] model.layers.2``
    """
    names = graph.symbol_names()
    lines = [f"task {graph.name}"]
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"  %{node.name} = input{_comment(node, names)}")
        elif node.op == "call_function":
            lines.append(f"  %{node.name} = {_call(node)}{_comment(node, names)}")
        elif node.op == "output":
            lines.append(f"  return {_argument(list(node.args[0]))}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node) -> str:
    if node.target in _INFIX:
        return f"{_argument(node.args[0])} {_INFIX[node.target]} {_argument(node.args[1])}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{operator_name(node.target)}({', '.join(arguments)})"


def operator_name(target: Any) -> str:
    """An operator's name, short: ``add.Tensor``, ``layer_norm``, ``drop``."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removeprefix("aten.").removeprefix("tokgraph.").removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"@{tensor_name(arg)}" if arg.op == "get_attr" else f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_argument(a) for a in arg)}]"
    if isinstance(arg, int) and not isinstance(arg, bool) and arg >= 2**62:
        return "end"
    return str(arg)


def _comment(node: fx.Node, names: dict[str, str]) -> str:
    val = tensor(node)
    if val is None:
        scalar = value(node)
        return f"  # {_dim(scalar, names)}" if isinstance(scalar, torch.SymInt) else ""
    shape = ", ".join(_dim(d, names) for d in val.shape)
    kind = str(val.dtype).removeprefix("torch.")
    module = module_path(node)
    made = f" by {node.meta['made_by']}" if "made_by" in node.meta else ""
    return f"  # {kind}[{shape}]{' ' + module if module else ''}{made}"


def _dim(size: int | torch.SymInt, names: dict[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    named = {s: sympy.Symbol(names[str(s)]) for s in expression.free_symbols if str(s) in names}
    return str(expression.subs(named))
