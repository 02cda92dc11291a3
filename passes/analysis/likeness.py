"""Likeness: two parts of a graph walked backwards together, operator by operator, from two nodes to the states before them.

Layers of a decoder are made alike. What one layer does with a value, the next does with the value that plays the same role;
so two walks side by side say which values of two states belong together, and where a layer without a successor ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

Pairs = dict[fx.Node, set[fx.Node]]


def pairs(a: fx.Node, b: fx.Node, stops: Collection[fx.Node], region: Collection[fx.Node]) -> Pairs:
    """What stands in the place of each of ``stops``, when ``a`` is followed backwards as ``b`` is.

    Where the two are made by different operators, the walk goes no further.

    Args:
        a: a node.
        b: a node that is computed from ``stops``.
        stops: the values at which the walk ends.
        region: what is computed from them; the rest are constants of a layer, which may differ.
    """
    found: Pairs = {}
    seen = set()
    stack = [(a, b)]
    while stack:
        pair = x, y = stack.pop()
        if pair in seen or y not in region:
            continue
        seen.add(pair)
        if y in stops:
            found.setdefault(y, set()).add(x)
        elif _same_call(x, y):
            stack += zip(_inputs(x), _inputs(y), strict=True)
    return found


def alike(
    a: fx.Node,
    b: fx.Node,
    before: Mapping[fx.Node, int],
    stops: Mapping[fx.Node, Collection[int]],
    region: Collection[fx.Node],
) -> bool:
    """Whether ``a`` is made of one state as ``b`` is made of another, each role of the one in the place of the other's.

    Args:
        a: a node.
        b: a node that is computed from ``stops``.
        before: the state that ``a`` is made of: value -> role.
        stops: that of ``b``: value -> roles; streams may begin as one value.
        region: what is computed from ``stops``.
    """
    seen = set()
    stack = [(a, b)]
    while stack:
        pair = x, y = stack.pop()
        if pair in seen:
            continue
        seen.add(pair)
        if y in stops or x in before:
            both = x is y and x not in before  # as what enters the first layer, and is added behind each
            if not both and (y not in stops or before.get(x) not in stops[y]):
                return False
        elif y in region:
            if not _same_call(x, y):
                return False
            stack += zip(_inputs(x), _inputs(y), strict=True)
    return True


def _inputs(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _same_call(a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls are of one operator, with arguments of the same form: numbers that scale values may differ."""
    return a.op == b.op == "call_function" and a.target is b.target and _form(a) == _form(b)


def _form(node: fx.Node) -> object:
    def of(argument: object) -> object:
        if isinstance(argument, (list, tuple)):
            return tuple(map(of, argument))
        if isinstance(argument, fx.Node):
            return fx.Node
        return float if isinstance(argument, float) else argument

    return of(node.args), tuple((name, of(x)) for name, x in sorted(node.kwargs.items()))
