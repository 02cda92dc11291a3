"""The tensors that a graph module holds: under names of the user's, whatever these are, where they collide with nothing."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

HOLDER = "tensors"
"""The submodule of a graph module that holds all its tensors: attributes of its own would shadow those of its class."""
_PREFIX = "t_"
"""How attributes of the holder begin, as no attribute of ``nn.Module`` does."""
_OTHERS = re.compile(r"[^0-9A-Za-z]")
_WRITTEN = re.compile(r"_([0-9a-f]*)_")
CONSTANTS = "tokgraph.constants"
"""Key of ``GraphModule.meta``: prefix of the names of constants that export lifted out of the code."""


def target_of(name: str) -> str:
    """What a ``get_attr`` node reads for the tensor of a name: ``tensors.t_layers_2e_0_2e_weight``.

    FX writes targets into Python code, so a name that is a keyword, or no identifier, is spelled out.
    """
    return f"{HOLDER}.{_PREFIX}{_OTHERS.sub(lambda found: _spelled(found.group()), name)}"


def _spelled(character: str) -> str:
    return "__" if character == "_" else f"_{ord(character):x}_"


def tensor_name(target: fx.Node | Any) -> str:
    """The name of the tensor that a ``get_attr`` node, or the target of one, reads; the inverse of :func:`target_of`."""
    text = str(target.target if isinstance(target, fx.Node) else target)
    start = f"{HOLDER}.{_PREFIX}"
    if not text.startswith(start):
        return text
    return _WRITTEN.sub(lambda found: chr(int(found[1], 16)) if found[1] else "_", text.removeprefix(start))


def held(module: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor that a graph module holds under a name, if it does."""
    holder, _, leaf = target_of(name).partition(".")
    return getattr(getattr(module, holder, None), leaf, None)


def hold(module: fx.GraphModule, name: str, x: torch.Tensor) -> str:
    """Let a graph module hold a tensor, a parameter or else a buffer; the target of nodes that read it."""
    target = target_of(name)
    holder, _, leaf = target.partition(".")
    if not hasattr(module, holder):
        module.add_module(holder, nn.Module())
    inside = module.get_submodule(holder)
    if isinstance(x, nn.Parameter):
        inside.register_parameter(leaf, x)
    else:
        inside.register_buffer(leaf, x, persistent=False)
    return target


def read(module: nn.Module, node: fx.Node) -> Any:
    """What a ``get_attr`` node of a graph module reads."""
    return operator.attrgetter(str(node.target))(module)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter or buffer of a model, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def constants_prefix(names: Iterable[str]) -> str:
    """A prefix for the names of constants under which the model has no tensor: ``_constants``, or longer."""
    first, prefix = {name.partition(".")[0] for name in names}, "_constants"
    while prefix in first:
        prefix += "_"
    return prefix
