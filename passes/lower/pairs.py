"""Complex numbers as pairs of real ones along a last axis, for runtimes that have no complex numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tokgraph.errors import ExportError
from tokgraph.ir.node import entered, fake_mode, output_args, value, where

from .graph import Lowered
from .inline import arguments, inlined

aten = torch.ops.aten
NAME = "complex-to-pairs"


@dataclass(frozen=True)
class Pairs:
    """A complex tensor.

    Args:
        x: ``[..., 2]``, real and imaginary parts.
    """

    x: Tensor

    @property
    def rank(self) -> int:
        """Axes of the complex tensor."""
        return self.x.dim() - 1

    def axis(self, dim: int) -> int:
        """An axis, counted from the front."""
        return dim % self.rank


def real_valued(lowered: Lowered) -> Lowered:
    """The same graph without complex values: each is a real one with an axis more, and each of its operators is written out.

    Raises:
        ExportError: an input, an output or a parameter is complex, or an operator on complex numbers is not known.
    """
    graph = lowered.module.graph
    complex_nodes = {node for node in graph.nodes if _is_complex(value(node))}
    if not complex_nodes:
        return lowered
    placeholders = list(graph.find_nodes(op="placeholder"))
    state = dict(zip(placeholders, lowered.state.items(), strict=False))
    for what, nodes in (("input", placeholders[len(state) :]), ("output", output_args(graph))):
        for node, name in zip(nodes, lowered.inputs if what == "input" else lowered.outputs, strict=True):
            if node in complex_nodes:
                raise _refused(lowered, f"the {what} {name!r} is complex", node)
    for node in complex_nodes & state.keys():
        name, x = state[node]
        if isinstance(x, nn.Parameter):
            raise _refused(lowered, f"the parameter {name!r} is complex", node)
        state[node] = (f"{name}.pairs", torch.view_as_real(x.resolve_conj()))
    pairs = {node: _pairs_of(node) for node in placeholders if node in complex_nodes}
    for node in list(graph.nodes):
        if node.op == "call_function" and (node in complex_nodes or pairs.keys() & set(node.all_input_nodes)):
            with graph.inserting_before(node):
                made = _written_out(lowered, node, pairs)
            if node in complex_nodes:
                pairs[node] = made
            else:
                node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    for node in complex_nodes.intersection(placeholders):
        graph.erase_node(node)
    lowered.module.recompile()
    return replace(lowered, state=dict(state.values()))


def _pairs_of(placeholder: fx.Node) -> fx.Node:
    """What stands for a tensor of the model; a node of its own, as others read its pairs as what they are."""
    with placeholder.graph.inserting_before(placeholder):
        made = placeholder.graph.placeholder(f"{placeholder.name}_pairs")
    with entered(fake_mode(placeholder.graph)):
        made.meta = {**placeholder.meta, "val": torch.view_as_real(value(placeholder))}
    return made


def _is_complex(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_complex()


def _refused(lowered: Lowered, what: str, node: fx.Node) -> ExportError:
    return ExportError(
        f"task {lowered.task!r}, {lowered.kind}: {what}, and ONNX has no complex numbers",
        where=where(node),
        help="write it with real numbers: real and imaginary parts as a last axis of size 2 (torch.view_as_real)",
    )


def _written_out(lowered: Lowered, node: fx.Node, pairs: dict[fx.Node, fx.Node]) -> fx.Node:
    """The nodes that compute a call on complex numbers with real ones."""
    rule = _RULES.get(getattr(node.target, "overloadpacket", None))
    if rule is None:
        raise _refused(lowered, f"{node.target} computes with complex numbers", node)
    leaves, spec = pytree.tree_flatten(arguments(node), is_leaf=lambda a: isinstance(a, slice))
    are_pairs = [isinstance(a, fx.Node) and a in pairs for a in leaves]

    def function(*values: Any) -> Any:
        given = [Pairs(x) if is_pair else x for x, is_pair in zip(values, are_pairs, strict=True)]
        found = rule(*pytree.tree_unflatten(given, spec))
        return found.x if isinstance(found, Pairs) else found

    return inlined(
        node, function, NAME, [pairs[a] if is_pair else a for a, is_pair in zip(leaves, are_pairs, strict=True)]
    )


# ------------------------------------------------------------------ operators; complex arguments are `Pairs`


def _pairs(re: Any, im: Any) -> Pairs:
    im = im if isinstance(im, Tensor) else torch.full_like(re, im)
    return Pairs(torch.stack(torch.broadcast_tensors(re, im), -1))


def _parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part, the latter the number 0 of what is real."""
    if isinstance(x, Pairs):
        return x.x.select(-1, 0), x.x.select(-1, 1)
    return (x, 0) if isinstance(x, Tensor) else (x.real, x.imag)


def _mul(a: Any, b: Any) -> Pairs:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    if isinstance(bi, (int, float)) and not bi:
        return _pairs(ar * br, ai * br)
    if isinstance(ai, (int, float)) and not ai:
        return _pairs(ar * br, ar * bi)
    return _pairs(ar * br - ai * bi, ar * bi + ai * br)


def _div(a: Any, b: Any) -> Pairs:
    br, bi = _parts(b)
    if isinstance(bi, (int, float)) and not bi:
        ar, ai = _parts(a)
        return _pairs(ar / br, ai / br)
    size = br * br + bi * bi
    return _mul(a, _pairs(br / size, -bi / size))


def _add(a: Any, b: Any, alpha: Any = 1) -> Pairs:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    return _pairs(ar + alpha * br, ai + alpha * bi)


def _conj(a: Pairs) -> Pairs:
    re, im = _parts(a)
    return _pairs(re, -im)


def _exp(a: Pairs) -> Pairs:
    re, im = _parts(a)
    return _pairs(re.exp() * im.cos(), re.exp() * im.sin())


def _size(a: Pairs) -> Tensor:
    re, im = _parts(a)
    size: Tensor = (re * re + im * im).sqrt()
    return size


def _sum(a: Pairs, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Pairs:
    axes = [a.axis(dim) for dim in dims] if dims else list(range(a.rank))
    return Pairs(a.x.sum(axes, keepdim))


def _copy(a: Any, dtype: torch.dtype | None = None, *rest: Any) -> Any:
    if not isinstance(a, Pairs):
        return _pairs(a, torch.zeros_like(a))
    return a.x.select(-1, 0) if dtype is not None and not dtype.is_complex else a


def _where(condition: Tensor, a: Any, b: Any) -> Pairs:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    return _pairs(torch.where(condition, ar, br), torch.where(condition, ai, bi))


def _for_pairs(index: Tensor) -> Tensor:
    """An index of elements, for both parts of each."""
    return index.unsqueeze(-1).expand(*index.shape, 2)


def _same(a: Any, *rest: Any) -> Any:
    return a


def _of_one(function: Callable[..., Tensor]) -> Callable[..., Pairs]:
    """A rule of an operator that does the same to both parts, from what it does to the pairs."""
    return lambda a, *args: Pairs(function(a, *args))


_RULES: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex: Pairs,
    aten.view_as_real: lambda a: a.x,
    aten.complex: _pairs,
    aten.polar: lambda size, angle: _pairs(size * angle.cos(), size * angle.sin()),
    aten.real: lambda a: _parts(a)[0],
    aten.imag: lambda a: _parts(a)[1],
    aten.abs: _size,
    aten.angle: lambda a: torch.atan2(*reversed(_parts(a))),
    aten.mul: _mul,
    aten.div: _div,
    aten.add: _add,
    aten.sub: lambda a, b, alpha=1: _add(a, b, -alpha),
    aten.exp: _exp,
    aten.sum: _sum,
    aten.where: _where,
    aten._to_copy: _copy,
    **dict.fromkeys((aten._conj, aten.conj, aten._conj_physical, aten.conj_physical), _conj),
    **dict.fromkeys((aten.alias, aten.clone, aten.detach, aten.resolve_conj, aten.contiguous), _same),
    aten.neg: _of_one(lambda a: -a.x),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view), _of_one(lambda a, sizes: a.x.reshape([*sizes, 2]))),
    aten.expand: _of_one(lambda a, sizes, *rest: a.x.expand([*sizes, 2])),
    aten.unsqueeze: _of_one(lambda a, dim: a.x.unsqueeze(dim % (a.rank + 1))),
    aten.squeeze: _of_one(lambda a, dim: a.x.squeeze(a.axis(dim))),
    aten.permute: _of_one(lambda a, dims: a.x.permute([*map(a.axis, dims), a.rank])),
    aten.transpose: _of_one(lambda a, first, second: a.x.transpose(a.axis(first), a.axis(second))),
    aten.slice: _of_one(lambda a, dim, *rest: aten.slice.Tensor(a.x, a.axis(dim), *rest)),
    aten.select: _of_one(lambda a, dim, index: a.x.select(a.axis(dim), index)),
    aten.index_select: _of_one(lambda a, dim, index: a.x.index_select(a.axis(dim), index)),
    aten.gather: _of_one(lambda a, dim, index, *rest: a.x.gather(a.axis(dim), _for_pairs(index))),
    aten.scatter: _of_one(lambda a, dim, index, b, *rest: a.x.scatter(a.axis(dim), _for_pairs(index), b.x)),
    aten.new_zeros: _of_one(lambda a, sizes, *rest: a.x.new_zeros([*sizes, 2])),
    aten.index: _of_one(lambda a, indices: aten.index.Tensor(a.x, indices)),
    aten.constant_pad_nd: _of_one(lambda a, pad, *rest: aten.constant_pad_nd.default(a.x, [0, 0, *pad])),
    aten.cat: lambda every, dim=0: Pairs(torch.cat([a.x for a in every], every[0].axis(dim))),
    aten.stack: lambda every, dim=0: Pairs(torch.stack([a.x for a in every], dim % (every[0].rank + 1))),
}
