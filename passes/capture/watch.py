"""What a forward does that leaves no trace in a graph, seen while it is traced: refused, or noted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils import checkpoint

from tokgraph.errors import CaptureError, Where

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])
_TRANSPARENT = ("torch._library", "torch._functorch", "torch._higher_order_ops", "torch._dynamo")
"""Modules whose functions PyTorch makes of operators, which a graph holds as they are."""
_STRAIGHT = (
    "write what it computes in plain operators, with detach() where the gradient shall be another one: y + (x - x.detach()) "
    "has the value of y and the gradient of x; x * s + (x - x * s).detach() has the value of x and s times its gradient; or "
    "make it an operator of its own, with torch.library.custom_op and register_autograd"
)


_SEEDS = ("manual_seed", "seed", "set_rng_state", "fork_rng")
"""Functions of ``torch.random`` that set PyTorch's generator."""


@dataclass
class Seen:
    """What was noted.

    Args:
        checkpoints: where the model recomputes activations.
        grad_modes: where it asks whether gradients are recorded.
    """

    checkpoints: list[Where] = field(default_factory=list)
    grad_modes: list[Where] = field(default_factory=list)


def check_hooks(model: nn.Module, outside: Collection[str] = ()) -> None:
    """Refuse hooks on the backward pass of modules.

    Args:
        model: the model.
        outside: paths of modules that are not in the graph.

    Raises:
        CaptureError: a module, or every module, has such a hook.
    """
    everywhere = nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
    for path, module in model.named_modules():
        if any(path == other or path.startswith(f"{other}.") for other in outside):
            continue
        if everywhere or module._backward_hooks or module._backward_pre_hooks:
            whose = "a backward hook for all modules" if everywhere else f"a backward hook of {type(module).__name__}"
            raise CaptureError(
                f"{whose} would be lost: a graph has no modules",
                where=None if everywhere else Where(module=path or "the model itself"),
                help="remove the hook before capture; change gradients in the forward, with detach(), or by hooks on"
                " parameters, which are kept",
            )


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Watch a forward that runs or is traced inside.

    Args:
        model: whose modules are named in errors.

    Raises:
        CaptureError: the forward calls a ``torch.autograd.Function``, registers a hook on a gradient, assigns ``.data``, or
            seeds a generator.
    """
    seen = Seen()
    paths = {id(module): path for path, module in model.named_modules()}

    def refused(what: str, help: str) -> CaptureError:
        return CaptureError(what, where=_place(paths), help=help)

    with ExitStack() as stack:
        for owner, name, replacement in _replacements(seen, paths, refused):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        yield seen


def _replacements(
    seen: Seen, paths: dict[int, str], refused: Callable[[str, str], CaptureError]
) -> Iterator[tuple[Any, str, Any]]:
    """``(owner, name, what takes its place)``."""
    recompute, asked, apply = (
        checkpoint._checkpoint_without_reentrant_generator, torch.is_grad_enabled, torch.autograd.Function.__dict__["apply"]
    )  # fmt: skip

    def function_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint.CheckpointFunction:
            seen.checkpoints.append(_place(paths))
            run, _, *given = args
            return run(*given)
        if cls.__module__.startswith(_TRANSPARENT):
            return apply.__get__(None, cls)(*args, **kwargs)
        if not torch.is_grad_enabled():  # its backward is not asked for
            result = apply.__get__(None, cls)(*args, **kwargs)
            torch._C._set_grad_enabled(torch.is_grad_enabled())  # a trace does not see that apply() set the mode back
            return result
        raise refused(f"the backward pass of the torch.autograd.Function {cls.__qualname__} would be lost", _STRAIGHT)

    def register_hook(*args: Any, **kwargs: Any) -> Any:
        raise refused(
            "the forward registers a hook on the gradient of a value, which would be lost",
            "change the gradient by detach(): x * s + (x - x * s).detach() has s times the gradient of x; hooks on parameters,"
            " registered once and outside of the forward, are kept",
        )

    data: Any = torch._C.TensorBase.data

    def set_data(x: torch.Tensor, value: torch.Tensor) -> None:
        if _is_users(sys._getframe(1)):
            raise refused("the forward assigns to .data, past autograd", "compute a new value instead")
        data.__set__(x, value)

    def get_data(x: torch.Tensor) -> Any:
        return x.detach() if _is_users(sys._getframe(1)) else data.__get__(x)

    def is_grad_enabled() -> bool:
        if _is_users(sys._getframe(1)):
            seen.grad_modes.append(_place(paths))
        return asked()

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        seen.checkpoints.append(_place(paths))
        return recompute(*args, **kwargs)

    def seeds(name: str) -> Callable[..., Any]:
        original = getattr(torch.random, name)

        def seeding(*args: Any, **kwargs: Any) -> Any:
            if _is_users(sys._getframe(1)):
                raise refused(
                    f"the forward sets PyTorch's random generator ({name}): a graph draws from it as it is",
                    "seed before the call, or draw outside of the forward and pass what was drawn as an input",
                )
            return original(*args, **kwargs)

        return seeding

    for name in _SEEDS:
        yield torch.random, name, seeds(name)
        yield torch, name, seeds(name)
    yield torch.autograd.Function, "apply", classmethod(function_apply)
    yield torch.Tensor, "register_hook", register_hook
    yield torch.Tensor, "register_post_accumulate_grad_hook", register_hook
    yield torch.autograd.graph, "register_multi_grad_hook", register_hook
    yield torch.Tensor, "data", property(get_data, set_data)
    yield torch, "is_grad_enabled", is_grad_enabled
    yield checkpoint, "_checkpoint_without_reentrant_generator", recomputing


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((_TORCH, _OWN, "<"))


def place_of(model: nn.Module) -> Where:
    """Where the forward of a model is: the innermost line outside of PyTorch, and the module it runs for."""
    return _place({id(module): path for path, module in model.named_modules()})


def _place(paths: dict[int, str]) -> Where:
    """The innermost line outside of PyTorch, and the module it runs for."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    source = None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    while frame is not None and id(_first_argument(frame)) not in paths:
        frame = frame.f_back
    path = None if frame is None else paths[id(_first_argument(frame))]
    return Where(module=path or None, source=source)


def _first_argument(frame: FrameType) -> object:
    """What a method's frame calls ``self``, under whatever name."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
