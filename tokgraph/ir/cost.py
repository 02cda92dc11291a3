"""What a training step costs, node by node, as data: FLOPs and bytes, symbolic in batch, tokens and visual tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import sympy

from tokgraph.errors import AnalysisError

from .sizes import Sizes, expression

Region = Literal["encoder", "input", "block", "head"]


@dataclass(frozen=True)
class Work:
    """FLOPs (a multiply-add is two) and bytes of one training step. Views cost nothing.

    Args:
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, for the parameters that require gradients.
        forward_read: bytes that the forward pass reads, parameters included.
        forward_written: bytes that the forward pass writes.
        backward_read: bytes that the backward pass reads.
        backward_written: bytes that the backward pass writes.
        saved: bytes of activations kept from the forward pass for the backward pass.
    """

    forward_flops: Any = 0
    backward_flops: Any = 0
    forward_read: Any = 0
    forward_written: Any = 0
    backward_read: Any = 0
    backward_written: Any = 0
    saved: Any = 0

    @property
    def flops(self) -> Any:
        """Forward and backward FLOPs."""
        return self.forward_flops + self.backward_flops

    @property
    def moved(self) -> Any:
        """Bytes read and written, forward and backward."""
        return self.forward_read + self.forward_written + self.backward_read + self.backward_written

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.amounts(), other.amounts(), strict=True)))

    def scaled(self, factor: Any) -> Work:
        """Every amount times ``factor``."""
        return Work(*(factor * amount for amount in self.amounts()))

    def amounts(self) -> tuple[Any, ...]:
        """The amounts in field order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def rounded(self) -> Work:
        """Every amount as an integer."""
        return Work(*(round(float(amount)) if not isinstance(amount, int) else amount for amount in self.amounts()))

    @classmethod
    def sum(cls, works: Iterable[Work]) -> Work:
        """The sum of some."""
        columns = zip(*(work.amounts() for work in works), strict=True)
        return cls(*(sum(column) for column in columns))


@dataclass(frozen=True)
class NodeCost:
    """What one FX node costs.

    Args:
        node: the node's name.
        op: the operator it calls.
        module: module path, ``""`` for the task's own forward.
        region: ``"encoder"`` (makes visual rows), ``"input"`` (before the first block), ``"block"``, ``"head"``.
        block: the block's index, ``None`` outside blocks.
        work: its amounts.
        visual: share of the rows it computes that are visual tokens, in ``[0, 1]``.
        text: share of the rows that are not; both shares are 0 for work without a token axis.
        degree: the power of the number of tokens that its FLOPs grow with: 0, 1, or 2 (scores of queries and keys).
    """

    node: str
    op: str
    module: str
    region: Region
    block: int | None
    work: Work
    visual: Any
    text: Any
    degree: int = 0


@dataclass(frozen=True)
class TaskCost:
    """The cost of one task's training step.

    Args:
        task: the task.
        nodes: cost of every call, in graph order; amounts are numbers or expressions in the graph's symbols.
        sizes: what the symbols stand for; ``None`` when the amounts are numbers.
        uncounted: ``(node, operator)`` of operators that may multiply matrices and whose FLOPs are not known.
    """

    task: str
    nodes: tuple[NodeCost, ...] = field(repr=False)
    sizes: Sizes | None = field(repr=False)
    uncounted: tuple[tuple[str, str], ...] = ()

    def at(self, /, **sizes: int) -> TaskCost:
        """The cost in numbers.

        Args:
            sizes: ``batch``, ``tokens``, ``visual`` or the user's dimension names; default: those of the example batch.

        Raises:
            AnalysisError: no such size, or the captured graph fixes it to another value.
        """
        if self.sizes is None:
            raise AnalysisError("these costs are numbers already", help="call .at(...) on the cost that analysis found")
        values = self.sizes.values(**sizes)
        known: dict[Any, Any] = {}

        def number(amount: Any) -> Any:
            if not isinstance(amount, sympy.Basic):
                return amount
            if amount not in known:
                found = expression(amount.xreplace(values))
                known[amount] = int(found) if found.is_Integer else float(found)
            return known[amount]

        nodes = tuple(
            NodeCost(
                n.node, n.op, n.module, n.region, n.block,
                Work(*map(number, n.work.amounts())), number(n.visual), number(n.text), n.degree,
            )
            for n in self.nodes
        )  # fmt: skip
        return TaskCost(self.task, nodes, None, self.uncounted)

    def total(self) -> Work:
        """The whole step; amounts of a symbolic cost are summed as expressions."""
        if self.sizes is None:
            return Work.sum(n.work for n in self.nodes) if self.nodes else Work()
        columns = zip(*(n.work.amounts() for n in self.nodes), strict=True)
        return Work(*(sympy.Add(*column) for column in columns))

    def by_region(self) -> dict[str, Work]:
        """``"encoder"``, ``"input"``, ``"block 0"`` ..., ``"head"`` -> work, in this order."""
        found: dict[str, list[Work]] = {"encoder": [], "input": []}
        for n in sorted((n for n in self.nodes if n.block is not None), key=lambda n: n.block or 0):
            found.setdefault(f"block {n.block}", [])
        found["head"] = []
        for n in self.nodes:
            found[n.region if n.block is None else f"block {n.block}"].append(n.work)
        return {name: Work.sum([Work(), *works]) for name, works in found.items()}

    def by_block(self) -> tuple[Work, ...]:
        """Work of each block."""
        return tuple(work for name, work in self.by_region().items() if name.startswith("block "))

    def by_module(self, depth: int | None = None) -> dict[str, Work]:
        """Module path, cut to ``depth`` parts, -> work of the module and all below it."""
        found: dict[str, list[Work]] = {}
        for n in self.nodes:
            path = ".".join(n.module.split(".")[:depth])
            found.setdefault(path, []).append(n.work)
        return {path: Work.sum(works) for path, works in found.items()}

    def by_kind(self) -> dict[str, Work]:
        """``"visual"``, ``"text"`` and ``"other"`` (work without a token axis) -> work; attention counts by its query."""
        visual = Work.sum([Work(), *(n.work.scaled(n.visual) for n in self.nodes)])
        other = Work.sum([Work(), *(n.work.scaled(1 - n.visual - n.text) for n in self.nodes)])
        if self.sizes is None:
            visual, other = visual.rounded(), other.rounded()
        text = self.total() + (visual + other).scaled(-1)  # what is left: the kinds sum to the whole
        return {"visual": visual, "text": text, "other": other}

    def rollups(self) -> dict[str, Any]:
        """``total``, ``by_region``, ``by_kind`` and ``by_module`` as plain integers, for JSON; of a cost in numbers."""

        def plain(work: Work) -> dict[str, int]:
            return {name: int(amount) for name, amount in asdict(work).items()}

        parts = {"by_region": self.by_region(), "by_kind": self.by_kind(), "by_module": self.by_module()}
        return {"total": plain(self.total())} | {
            how: {name: plain(work) for name, work in works.items()} for how, works in parts.items()
        }
