"""The contract of a pass: a name and plain fields, facts as an argument, and the one place where passes are run."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from tokgraph.errors import InternalError, PlanError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.open_sizes import OpenSizes

Numerics = Literal["exact", "approximate"]
Pass = Callable[[fx.GraphModule], PassResult | None]
"""A pass of torch's: it edits a graph module, or makes another one. Every :class:`GraphPass` is one as well."""
_PASSES: dict[str, type[GraphPass]] = {}


class GraphPass(abc.ABC):
    """A pass over one task graph. Subclasses are frozen dataclasses; their fields are their options, and plain data.

    Defining a subclass registers it by its name. What a pass needs to know of the task comes as an argument, so that the
    name and the fields are all there is to it (:meth:`to_data`, :func:`pass_of`). A pass with a field ``task`` runs on
    that task's graph only.

    Class attributes:
        name: the pass's name on the command line, in diagnostics and in documentation.
        numerics: ``"exact"``: outputs and gradients stay equal beyond rounding; ``"approximate"``: they may not.

    Raises:
        ValueError: another pass has the name.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = "exact"

    def __init_subclass__(cls) -> None:
        known = _PASSES.setdefault(cls.name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"pass {cls.name!r} is defined twice: {known.__qualname__} and {cls.__qualname__}")
        _PASSES[cls.name] = cls

    def __call__(self, graph_module: fx.GraphModule, facts: TaskFacts | None = None) -> PassResult:
        """Run the pass: precondition, edit, postcondition; ``modified`` is found out by comparing the graphs."""
        return run_pass(self, graph_module, facts)

    def requires(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Check the precondition; raise where it does not hold. The default asks for nothing."""
        return None

    @abc.abstractmethod
    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Edit the graph in place. Who runs the pass recompiles, and sees for itself what changed.

        Args:
            graph_module: the task's graph.
            facts: the facts of the task's captured graph; ``None`` where there are none yet.
        """

    def ensures(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Check the postcondition on the result; raise where it does not hold. The default promises nothing."""
        return None

    def needed(self, facts: TaskFacts | None) -> TaskFacts:
        """The facts, for a pass that cannot do without.

        Raises:
            InternalError: the pass was run without them.
        """
        if facts is None:
            raise InternalError(f"pass {self.name} needs the facts of the task")
        return facts

    def to_data(self) -> dict[str, Any]:
        """The pass as JSON-able data, ``{"name": ..., "options": {field: value}}``."""
        return {"name": self.name, "options": TypeAdapter(type(self)).dump_python(self, mode="json")}


def registered_passes() -> dict[str, type[GraphPass]]:
    """Name -> class of every pass that was defined, by name."""
    return dict(sorted(_PASSES.items()))


def pass_of(data: Mapping[str, Any]) -> GraphPass:
    """The pass that :meth:`GraphPass.to_data` wrote down.

    Raises:
        PlanError: no pass has the name, or an option is unknown, missing or of another type.
    """
    name = data.get("name")
    cls = _PASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise PlanError(f"no pass is named {name!r}", help=f"the passes are {', '.join(registered_passes())}")
    try:
        # by way of JSON: strict as it is then, "true" is no bool, and a list is a tuple
        made: GraphPass = TypeAdapter(cls).validate_json(json.dumps(data.get("options", {})), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanError(f"pass {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return made


def pass_name(function: Pass) -> str:
    """A pass's name: its ``name`` attribute, or what Python calls it."""
    return str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))


def run_pass(
    function: Pass, graph_module: fx.GraphModule, facts: TaskFacts | None = None, recompile: bool = True
) -> PassResult:
    """Run a pass, and recompile what it changed.

    Args:
        function: the pass.
        graph_module: the task's graph.
        facts: the facts of the task's captured graph.
        recompile: ``False``: the caller recompiles, once for several passes, before the module is called.

    Returns:
        The module, and whether its graph is another one than before: what the pass says of it is not taken on trust.

    Raises:
        InternalError: the pass returned something else than a result, or said that it changed nothing when it did, or took
            a size that may change for the one of the example batch.
    """
    before, sizes = fingerprint(graph_module.graph), OpenSizes.of(graph_module.graph)
    if isinstance(function, GraphPass):
        function.requires(graph_module, facts)
        function.call(graph_module, facts)
        function.ensures(graph_module, facts)
        result, denied = graph_module, False
    else:
        result, denied = _run_plain(function, graph_module)
    if fixed := sizes.fixed_since():
        raise InternalError(f"it takes sizes that are open for those of the example batch: {', '.join(fixed)}")
    modified = fingerprint(result.graph) != before
    if modified and denied:
        raise InternalError("it says that it changed nothing, and the graph is another one")
    if modified and recompile:
        result.recompile()
    return PassResult(result, modified)


def _run_plain(function: Pass, graph_module: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """The module that a pass of torch's leaves, and whether it denies that it changed anything."""
    result = function(graph_module)
    if result is None:  # edited in place
        return graph_module, False
    if not isinstance(result, PassResult) or not isinstance(result.graph_module, fx.GraphModule):
        raise InternalError(f"it returned {type(result).__name__}, which is no PassResult of a graph module")
    return result.graph_module, not result.modified


def fingerprint(graph: fx.Graph) -> tuple[tuple[str, str, object, str, str], ...]:
    """All that a graph computes: its calls in order, with names, targets, arguments and outputs; equal for equal graphs.

    Arguments are compared as text, in which a node is its name: Python takes ``1``, ``1.0`` and ``True`` for equal.
    """
    return tuple((node.op, node.name, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes)
