"""Text of a file that Python or sympy will evaluate: arithmetic over sizes, and nothing else."""

from __future__ import annotations

import ast
from typing import Any

from torch.utils import _pytree as pytree

from tokgraph.files import parse_json

_LONGEST = 100_000
"""Characters of an expression: those of 96 blocks take hundreds."""
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.IfExp, ast.Name, ast.Load,
    ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not, ast.And,
    ast.Or, ast.cmpop,
)  # fmt: skip
_LARGEST_POWER = 16
"""And no power of a power: a size to a high power fills the memory."""
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_MODULES = ("math",)
_CONTAINERS = (None, "builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict")
"""Types of the structures that a file may hold; what else pytree knows is built by importing what the file names."""


def arithmetic(text: str, functions: frozenset[str]) -> str:
    """The same text, which is known to compute a number or a truth value from names and numbers.

    Args:
        text: a Python expression.
        functions: what it may call: plain names, or ``math.NAME``.

    Raises:
        ValueError: it is none, or holds anything else, such as attributes, subscripts and strings that are no names.
    """
    if len(text) > _LONGEST or set(text) & set("#\n\\"):  # it is also written into a longer line
        raise ValueError(f"{text[:80]!r} is no expression")
    try:
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            _check(node, functions)
        compile(tree, "<file>", "eval")  # parses more deeply nested text than it compiles
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text[:80]!r} is no expression") from None
    return text


def _check(node: ast.AST, functions: frozenset[str]) -> None:
    if not isinstance(node, (*_ALLOWED, ast.Attribute)):
        raise ValueError(f"{type(node).__name__}, which is no arithmetic")
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        if called not in functions:
            raise ValueError(f"a call of {called[:80] or 'something'!r}, which is no arithmetic")
        if called in _POWERS:
            _check_power(node.args)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        _check_power([node.left, node.right])
    elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in _MODULES):
        raise ValueError(f"{ast.unparse(node)[:80]!r}, which is no arithmetic")
    elif isinstance(node, ast.Name) and node.id.startswith("__"):
        raise ValueError(f"the name {node.id[:80]!r}")
    elif isinstance(node, ast.Constant):
        _check_constant(node.value)


def _check_power(operands: list[ast.expr]) -> None:
    """A small power of what is no power."""
    exponent = operands[-1]
    numbers = [node.value for node in ast.walk(exponent) if isinstance(node, ast.Constant)]
    powers = [
        node
        for operand in operands
        for node in ast.walk(operand)
        if isinstance(node, ast.Pow) or (isinstance(node, ast.Call) and ast.unparse(node.func) in _POWERS)
    ]
    if powers or any(not isinstance(x, int | float) or x > _LARGEST_POWER for x in numbers):
        raise ValueError("a power that may be larger than any size")


def _check_constant(value: object) -> None:
    """Numbers of ordinary size, and names in quotes, as in ``Symbol('s0')``."""
    if isinstance(value, str):
        if value.startswith("__") or not (value.isidentifier() or value.replace(".", "").replace("-", "").isdigit()):
            raise ValueError(f"the text {value[:80]!r}")
    elif not isinstance(value, bool | int | float) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError(f"the constant {str(value)[:80]}")


def structure(text: str) -> str:
    """The same text, which is known to describe nested dicts, lists and tuples, as ``pytree.treespec_dumps`` writes them.

    Raises:
        ValueError: it does not, or describes what is built by importing a module that the text names.
    """
    try:
        _, tree = parse_json(text)
        _check_structure(tree)
        pytree.treespec_loads(text)
    except ValueError:
        raise
    except (TypeError, KeyError, AttributeError, AssertionError, NotImplementedError, RecursionError):
        raise ValueError(f"{text[:80]!r} describes no structure of inputs") from None
    return text


def _check_structure(tree: dict[str, Any]) -> None:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if node["type"] not in _CONTAINERS:
            raise ValueError(f"a structure of type {str(node['type'])[:80]}")
        context = node["context"]
        if isinstance(context, str) and not _plain_keys(parse_json(context)):
            raise ValueError(f"the keys {context[:80]}")
        waiting += node["children_spec"]


def _plain_keys(keys: object) -> bool:
    """Whether keys of a dict are text and numbers, and no enumeration that would have to be imported."""
    return keys is None or (isinstance(keys, list) and all(isinstance(k, str | int | float | bool) for k in keys))
