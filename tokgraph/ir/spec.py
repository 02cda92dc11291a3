"""What a user writes: a model, its tasks, and where each task's visual tokens are."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError, LoadError, SpecError, TokgraphError

from .names import check_name, check_task_names
from .precomputed import called_at

Reads = Literal["text", "visual", "all"]
Outputs = Literal["loss", "full"]
LOSS_KEY = "loss"


@dataclass(frozen=True)
class VisualTokens:
    """Where the visual tokens of a task are; build one with :meth:`ids`, :meth:`mask` or :meth:`positions`."""

    kind: Literal["ids", "mask", "positions"]
    input: str | None = None
    low: int | None = None
    high: int | None = None
    span: tuple[int | None, int | None] | None = None

    @classmethod
    def ids(
        cls, *, input: str, equal: int | None = None, low: int | None = None, high: int | None = None
    ) -> VisualTokens:
        """Positions whose token id equals ``equal``, or lies in ``[low, high]``.

        Args:
            input: name of the ``[batch, tokens]`` integer input.
            equal: the id of the image placeholder.
            low: smallest id of an image token.
            high: largest id of an image token, inclusive.

        Raises:
            SpecError: neither ``equal`` nor both of ``low`` and ``high`` are given, or ``low > high``.
        """
        if equal is not None and low is None and high is None:
            low = high = equal
        if low is None or high is None or (equal is not None and not low == equal == high):
            raise SpecError("VisualTokens.ids needs equal=, or both of low= and high=")
        if low > high:
            raise SpecError(f"VisualTokens.ids: low={low} is larger than high={high}")
        return cls("ids", input=input, low=low, high=high)

    @classmethod
    def mask(cls, *, input: str) -> VisualTokens:
        """Positions at which the ``[batch, tokens]`` boolean input ``input`` is true."""
        return cls("mask", input=input)

    @classmethod
    def positions(cls, where: slice) -> VisualTokens:
        """The same contiguous positions in every row, as a slice of the token axis (negative bounds allowed).

        Raises:
            SpecError: the slice has a step other than 1.
        """
        if where.step not in (None, 1):
            raise SpecError(f"VisualTokens.positions needs a contiguous slice, got step {where.step}")
        return cls("positions", span=(where.start, where.stop))


@dataclass(frozen=True)
class Task:
    """One training path of a unified model.

    Args:
        forward: ``(model, **inputs) -> loss | (loss, outputs...) | mapping with "loss"``; the loss is a scalar.
        inputs: an example batch, by argument name: tensors, or plain Python values that stay constant.
        dynamic: ``{input: {dimension: name}}``, the dimensions that should stay symbolic.
        visual: where the visual tokens are; ``None``: found by analysis from ``visual_inputs``.
        visual_inputs: names of the inputs that carry image content, used when ``visual`` is ``None``.
        reads: what the loss predicts (``"text"``, ``"visual"`` or ``"all"`` positions).
        outputs: ``"loss"``: returned tensors other than the loss may hold the demanded rows only;
            ``"full"``: every returned tensor keeps its shape, every row is demanded.
        segments: ``(**inputs) -> {name: [batch, tokens] bool}``, parts of the sequence between which attention is
            measured, disjoint; positions in none of them are the segment ``"other"``. ``None``: system, image,
            instruction and output are found from the visual tokens and the labels.
        precomputed: paths of submodules of the model, or of methods of one, that are left out of the graph: they run as the
            user wrote them, before it, and it takes what they return (docs/calls.md). ``dynamic`` and ``visual_inputs`` may
            name them as inputs.

    Raises:
        SpecError: a field contradicts another.
    """

    forward: Callable[..., Any]
    inputs: Mapping[str, Any]
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    visual: VisualTokens | None = None
    visual_inputs: tuple[str, ...] = ()
    reads: Reads = "all"
    outputs: Outputs = "loss"
    segments: Callable[..., Mapping[str, torch.Tensor]] | None = None
    precomputed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("visual_inputs", "precomputed"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        object.__setattr__(self, "precomputed", tuple(dict.fromkeys(self.precomputed)))
        if self.reads not in ("text", "visual", "all"):
            raise SpecError(f"reads={self.reads!r} is not one of 'text', 'visual', 'all'")
        if self.outputs not in ("loss", "full"):
            raise SpecError(f"outputs={self.outputs!r} is not one of 'loss', 'full'")
        if self.visual is None and not self.visual_inputs:
            raise SpecError(
                "a task needs visual= or visual_inputs=",
                help="say where the visual tokens are (tg.VisualTokens.ids/mask/positions), or name the inputs that "
                "carry image content and let analysis find them",
            )
        if not callable(self.forward):
            raise SpecError(f"forward must be callable as forward(model, **inputs), got {type(self.forward).__name__}")
        if self.segments is not None and not callable(self.segments):
            raise SpecError(f"segments must be callable as segments(**inputs), got {type(self.segments).__name__}")

    def check(self, name: str) -> None:
        """Raise :class:`SpecError` where names in this task do not fit its inputs or its forward's signature."""
        for key in self.inputs:
            check_name(f"task {name!r}: an input", key)
        for dims in (self.dynamic or {}).values():
            for dimension in dims.values():
                check_name(f"task {name!r}: a dimension", dimension)
        self._check_signature(name)
        for what, used in (
            ("dynamic", list(self.dynamic or ())),
            ("visual", [self.visual.input] if self.visual is not None and self.visual.input else []),
            ("visual_inputs", list(self.visual_inputs)),
        ):
            for key in used:
                if key not in self.inputs and not (what != "visual" and self._is_precomputed(key)):
                    raise SpecError(
                        f"task {name!r}: {what} names {key!r}, which is not among its inputs",
                        help=f"the inputs are {', '.join(map(repr, (*self.inputs, *self.precomputed)))}",
                    )
        for key, dims in (self.dynamic or {}).items():
            if key not in self.inputs:
                continue  # of what is precomputed, sizes are known when it was
            value = self.inputs[key]
            for dim in dims:
                if not isinstance(value, torch.Tensor) or not 0 <= dim < value.dim():
                    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise SpecError(f"task {name!r}: dynamic dimension {dim} of input {key!r} ({shape}) does not exist")

        self._check_sizes(name)

    def _is_precomputed(self, key: str) -> bool:
        """Whether a name stands for what is precomputed: its path, or one of the tensors it returns."""
        path, _, number = key.rpartition(".")
        return key in self.precomputed or (path in self.precomputed and number.isdigit())

    def _check_sizes(self, name: str) -> None:
        """Refuse one name for dimensions of several sizes."""
        seen: dict[str, tuple[str, int, int]] = {}
        for key, dims in (self.dynamic or {}).items():
            for dim, dimension in dims.items() if key in self.inputs else ():
                size = self.inputs[key].shape[dim]
                other, at, first = seen.setdefault(dimension, (key, dim, size))
                if size != first:
                    raise SpecError(
                        f"task {name!r}: dimension {dimension!r} is {first} in {other!r}[{at}] and {size} in {key!r}[{dim}]",
                        help="a name stands for one size: give the other dimension another name",
                    )

    def _check_signature(self, name: str) -> None:
        self._check_call(
            name,
            "forward",
            (None,),
            "inputs= must hold every required argument of forward(model, **inputs), and no other",
        )
        if self.segments is not None:
            self._check_call(name, "segments", (), "segments(**inputs) is called with every input of the task, by name")

    def _check_call(self, name: str, field: str, before: tuple[None, ...], help: str) -> None:
        try:
            inspect.signature(getattr(self, field)).bind(*before, **self.inputs)
        except TypeError as error:
            raise SpecError(f"task {name!r}: the example inputs do not fit its {field}: {error}", help=help) from None
        except ValueError:  # no signature to inspect (a C callable): calling it will tell
            return


@dataclass(frozen=True)
class ModelSpec:
    """A model and its tasks: what ``build()`` of a model file returns.

    Args:
        model: any ``nn.Module``, on a real device or on ``meta``.
        tasks: task name -> :class:`Task`.

    Raises:
        SpecError: there is no task, or a task does not fit its inputs.
    """

    model: nn.Module
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise SpecError(f"model must be an nn.Module, got {type(self.model).__name__}")
        if not self.tasks:
            raise SpecError("a ModelSpec needs at least one task")
        check_task_names(self.tasks)
        for name, task in self.tasks.items():
            if not isinstance(task, Task):
                raise SpecError(f"task {name!r} must be a tokgraph.Task, got {type(task).__name__}")
            task.check(name)
            for path in task.precomputed:
                called_at(self.model, path)


def load(path: str | Path, **kwargs: Any) -> ModelSpec:
    """Run the ``build`` function of a model file.

    As under ``python model.py``, the file's own folder is searched first for modules, until ``build`` has returned.

    Args:
        path: ``model.py`` or ``model.py:function``.
        kwargs: arguments of the function.

    Raises:
        LoadError: no such file, no such function, wrong arguments, an error inside the file, or a wrong result.
    """
    file, _, name = str(path).partition(":")
    function_name = name or "build"
    with _folder_of(Path(file)):
        module = _import_file(Path(file))
        function = getattr(module, function_name, None)
        if not callable(function):
            raise LoadError(
                f"{file} defines no function {function_name!r}",
                help=f"define `def {function_name}(...) -> tokgraph.ModelSpec`, or name another as {file}:function",
            )
        try:
            inspect.signature(function).bind(**kwargs)
        except TypeError as error:
            raise LoadError(
                f"{function_name}() of {file} cannot be called: {error}",
                help=f"its signature is {function_name}{inspect.signature(function)}; pass arguments with --set name=value",
            ) from None
        try:
            spec = function(**kwargs)
        except TokgraphError:
            raise
        except (Exception, SystemExit) as error:
            raise LoadError(f"{function_name}() of {file} failed: {type(error).__name__}: {error}") from error
    if not isinstance(spec, ModelSpec):
        raise LoadError(f"{function_name}() of {file} returned {type(spec).__name__}, not a tokgraph.ModelSpec")
    return spec


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """The folder of a model file as the first place to look for modules."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"no such model file: {path}")
    module_spec = importlib.util.spec_from_file_location(f"tokgraph_model_{path.stem}", path.resolve())
    if module_spec is None or module_spec.loader is None:
        raise LoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling look their module up there
    try:
        module_spec.loader.exec_module(module)
    except TokgraphError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself is no model file
        del sys.modules[module_spec.name]
        raise LoadError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def no_forward(*args: Any, **inputs: Any) -> Any:
    """The forward of a task that was loaded from a file: there is none, only its graph."""
    raise SpecError("a loaded program holds no code of the model", help="call the task: accelerated[name](**inputs)")


def split_outputs(result: Any) -> tuple[torch.Tensor, Any]:
    """``(loss, whole result)`` of what a task's forward returned.

    Raises:
        SpecError: the result holds no scalar loss.
    """
    loss: Any = result
    if isinstance(result, Mapping):
        loss = result.get(LOSS_KEY)
    elif isinstance(result, (tuple, list)):
        loss = result[0] if result else None
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        leaves = [tuple(x.shape) for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        raise SpecError(
            "a task's forward must return a scalar loss, got "
            + (f"tensors of shapes {leaves}" if leaves else f"a {type(result).__name__}, which holds none"),
            help='return loss, (loss, outputs...), or a mapping with the key "loss"',
        )
    return loss, result


def check_tasks(named: Iterable[str], known: Mapping[str, Any]) -> None:
    """Raise :class:`BatchError` where batches are named for a task that there is not."""
    for name in named:
        if name not in known:
            raise BatchError(
                f"batches are for a task {name!r}, which the model does not have", help=f"it has {', '.join(known)}"
            )
