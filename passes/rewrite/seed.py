"""Seeds: a few nodes that write the semantics of drop sites and of demand into a graph, changing no shape after them.

A seeded graph is valid and computes the answer already; :class:`~tokgraph.passes.rewrite.pushdown.PushDown` then moves the
selections towards the inputs, where they save work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.errors import PlanError
from tokgraph.ir.blocks import Attention, Block
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, by_name, output_args, rank, refresh_value, set_argument
from tokgraph.ir.plan import DropSite

from ..analysis.attentions import weights_of
from ..contract import GraphPass, Numerics
from ..emitter import RESIDUAL, Emitter, remove_dead_code
from ..order import sort_nodes
from ..rules import traits
from ..rules.registry import is_one
from .index import IndexBuilder, check_disjoint_or_nested
from .left_queries import let_left_queries_see
from .legality import check_blocks
from .outputs import narrowed_readers, seed_outputs
from .own_projections import seed_projections
from .row_space import RowSpace, indices, laid_out, unpadded
from .scores import Seen
from .sides import seed_sides, side_nodes, side_readers
from .unread import Check, RowReaders, outside_readers, pass_through_checks

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class ExplicitCausalMask(GraphPass):
    """Gives attentions with ``is_causal`` the mask they imply, so that their rows can be narrowed.

    Args:
        task: the task.
        blocks: the blocks whose attentions are rewritten.
    """

    name: ClassVar[str] = "explicit-causal-mask"
    task: str
    blocks: tuple[int, ...]

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace ``is_causal=True`` by a lower-triangular boolean mask."""
        blocks = self.needed(facts).blocks
        nodes = by_name(graph_module.graph)
        emit = Emitter(graph_module.graph, self.name)
        for block in self.blocks:
            for attention in blocks[block].attention:
                node = nodes[attention.node]
                if attention.kind == "sdpa" and argument(node, "is_causal", False):
                    _make_mask_explicit(emit, node)


def _make_mask_explicit(emit: Emitter, node: fx.Node) -> None:
    query, key = argument(node, "query"), argument(node, "key")
    sizes = [emit.size(query, rank(query) - 2), emit.size(key, rank(key) - 2)]
    device = node.meta["val"].device
    ones = emit.call(aten.ones.default, sizes, dtype=torch.bool, device=device, origin=node)
    mask = emit.call(aten.tril.default, ones, origin=node)
    set_argument(node, "attn_mask", mask)
    set_argument(node, "is_causal", False)


@dataclass(frozen=True)
class SeedSites(GraphPass):
    """Writes drop sites: freezes the dropped rows in each block of a span, and hides them from attention.

    ``freeze`` of a block: ``h_out' = restore(h_in, drop(h_out, idx), idx)``. ``hide``: the same, and key, value and mask
    of the block's attention are selected along the key axis.

    Args:
        task: the task.
        sites: its drop sites, resolved, outer spans first.
        exact: also select what demanded outputs read.

    Raises:
        IllegalRewriteError: a block in a span cannot be shown to be row-wise but for attention.
        PlanError: a site cannot be placed.
    """

    name: ClassVar[str] = "seed-sites"
    numerics: ClassVar[Numerics] = "approximate"
    task: str
    sites: tuple[DropSite, ...]
    exact: bool = False

    def requires(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Spans are nested or disjoint, and every block in them is understood."""
        facts = self.needed(facts)
        last = len(facts.blocks)
        reach = tuple(
            DropSite(s.task, s.start, s.end if s.restore else last, s.keep, s.selector, s.mode) for s in self.sites
        )
        check_disjoint_or_nested(reach)
        inside = {b for s in reach for b in range(s.start, s.end or last)}
        frozen = {b for s in self.sites if s.mode == "freeze" for b in range(s.start, s.end or last)}
        check_blocks(graph_module.graph, facts, [facts.blocks[b] for b in sorted(inside)], frozen)

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Seed every block of every span, then the outputs."""
        facts = self.needed(facts)
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        build = IndexBuilder(emit, facts)
        nodes = by_name(graph)
        checks = self._unread(facts, build, emit, nodes)
        for name in facts.states:
            nodes[name].meta[RESIDUAL] = True
        spaces: tuple[RowSpace, ...] = ()
        streams = [nodes[name] for name in facts.blocks[0].before]
        hides: dict[int, list[fx.Node]] = {}
        for block in facts.blocks:
            spaces = self._spaces(facts, block.index, spaces, build, emit, streams)
            if any(s.projections == "own" and s.start <= block.index < (s.end or 0) for s in self.sites):
                hidden = [space for space in spaces if _hides(space.site, block.index)]
                order = seed_projections(block, spaces, hidden, self.task, emit, build, nodes)
                _hide_all_keys(block, [] if order is None else [order], None, emit, nodes)
            streams = self._seed_block(block, spaces, emit, nodes, streams)
            if hidden := [space for space in spaces if _hides(space.site, block.index)]:
                hides[block.index] = indices(hidden)
        spaces = tuple(space for space in spaces if not space.site.restore)
        seed_outputs(graph_module, emit, build, facts, streams, spaces, self.exact)
        pass_through_checks(emit, graph, checks)
        sort_nodes(graph)  # a choice of rows may stand after nodes that now read it
        remove_dead_code(graph)
        let_left_queries_see(emit, facts, hides)

    def _unread(self, facts: TaskFacts, build: IndexBuilder, emit: Emitter, nodes: dict[str, fx.Node]) -> list[Check]:
        """What must hold in each batch so that no rows are read that a site without restore drops."""
        gone = [s.start for s in self.sites if not s.restore and s.keep < 1 and not only_projects(s, facts)]
        if not gone or facts.demand.reads == "all":
            return []
        losses, leaves = narrowed_readers(emit.graph, facts, self.exact)
        sides = side_readers(facts.blocks[min(gone) :], nodes)
        readers = RowReaders(emit, facts, build.demanded, losses | sides)
        readers.follow(*outside_readers(facts, nodes, min(gone)))
        readers.leave(node for leaf, node in enumerate(output_args(emit.graph)) if leaf not in leaves)
        return readers.checks

    def _spaces(
        self,
        facts: TaskFacts,
        block: int,
        spaces: tuple[RowSpace, ...],
        build: IndexBuilder,
        emit: Emitter,
        streams: Sequence[fx.Node],
    ) -> tuple[RowSpace, ...]:
        """The spaces open in ``block``, outermost first; ``spaces``: those of the block before."""
        before = spaces
        spaces = tuple(space for space in spaces if not space.site.restore or block < (space.site.end or 0))
        for site in self.sites:
            if site.start == block and not only_projects(site, facts):
                inner = _scored(emit, streams, spaces)
                attention = next(iter(facts.blocks[block - 1].attention), None) if block else None
                keys = tuple(space for space in before if _hides(space.site, block - 1))
                spaces = (*spaces, build.site(site, spaces, Seen(inner, spaces, attention, before, keys)))
        hidden = [_hides(space.site, block) for space in spaces]
        if hidden != sorted(hidden, reverse=True):
            raise PlanError(
                f"task {self.task!r}: block {block} has a 'hide' site inside a 'freeze' site",
                help="nest 'freeze' inside 'hide', or give both the same mode",
            )
        return spaces

    def _seed_block(
        self,
        block: Block,
        spaces: tuple[RowSpace, ...],
        emit: Emitter,
        nodes: dict[str, fx.Node],
        before: list[fx.Node],
    ) -> list[fx.Node]:
        after = [nodes[name] for name in block.after]
        if not spaces:
            return after
        hidden = [space for space in spaces if _hides(space.site, block.index)]
        seen = unpadded(emit, spaces, hidden)
        _hide_all_keys(block, indices(hidden), seen, emit, nodes)
        seed_sides(block, spaces, self.task, emit, nodes)
        inside = {*block.nodes, *side_nodes(block, nodes)}
        readers = [[user for user in end.users if user.name not in inside] for end in after]
        merged = [_frozen(emit, start, end, spaces) for start, end in zip(before, after, strict=True)]
        for end, reading, new in zip(after, readers, merged, strict=True):
            for reader in reading:
                reader.replace_input_with(end, new)
        return merged


def _scored(emit: Emitter, streams: Sequence[fx.Node], spaces: Sequence[RowSpace]) -> fx.Node:
    """``[batch, rows, features]``: the rows that a selector looks at; a row of several streams is scored as one."""
    rows = []
    for stream in streams:
        inner = emit.chain(stream, indices(spaces))
        rows.append(emit.call(aten.flatten.using_ints, inner, 2, -1, origin=inner) if rank(inner) > 3 else inner)
    return rows[0] if len(rows) == 1 else emit.call(aten.cat.default, rows, -1, origin=rows[0])


def only_projects(site: DropSite, facts: TaskFacts) -> bool:
    """Whether a site drops nothing and is there for its projections."""
    return site.projections == "own" and site.kept(facts.visual.count) == facts.visual.count


def _hides(site: DropSite, block: int) -> bool:
    return site.mode == "hide" or (site.end is not None and block >= site.end)


def _frozen(emit: Emitter, before: fx.Node, after: fx.Node, spaces: Sequence[RowSpace]) -> fx.Node:
    """``after`` with the rows that any space leaves out, and padding, taken from ``before``."""
    if not spaces:
        return after
    space, *inner = spaces
    unchanged = emit.select(before, space.index)
    rows = _frozen(emit, unchanged, emit.select(after, space.index), inner)
    padding = None if inner else space.padding(emit)
    if padding is not None:
        for _ in range(rank(rows) - 2):
            padding = emit.call(aten.unsqueeze.default, padding, -1, origin=padding)
        rows = emit.call(aten.where.self, padding, unchanged, rows, origin=after)
        rows.meta[RESIDUAL] = True
    merged = emit.call(tokgraph.restore.default, before, rows, space.index, origin=after)
    merged.meta[RESIDUAL] = True
    return merged


def _hide_all_keys(
    block: Block, hidden: list[fx.Node], seen: fx.Node | None, emit: Emitter, nodes: dict[str, fx.Node]
) -> None:
    """Select the visible keys of every attention of a block, then compute the shapes of their weights anew: those of two
    attentions may meet. Arguments are as in :func:`_hide_keys`.
    """
    if not hidden:
        return
    between: dict[fx.Node, int] = {}
    for attention in block.attention:
        if attention.kind == "eager":
            softmax = nodes[attention.node]
            found = weights_of(softmax, attention.keys[0].axis)
            assert found is not None  # that is how it was found
            between |= {**found[1], found[0]: -1}
    for attention in block.attention:
        _hide_keys(attention, hidden, seen, emit, nodes)
    _refresh_weights(emit, between, hidden[-1])


def _hide_keys(
    attention: Attention, hidden: list[fx.Node], seen: fx.Node | None, emit: Emitter, nodes: dict[str, fx.Node]
) -> None:
    """Select the visible keys: key, value and mask of a fused attention; the scores that softmax normalises and the
    values that it weighs.

    Args:
        attention: the attention.
        hidden: indices, outermost first, of the keys that stay.
        seen: ``[batch, 1, tokens, keys]`` bool, who may see whom among these.
        emit: where nodes go.
        nodes: the graph's nodes by name.
    """
    node, batch = nodes[attention.node], attention.batch
    assert batch is not None  # checked before
    if seen is not None:
        seen = laid_out(emit, seen, rank(node), batch)
    if attention.kind == "sdpa":
        for role in ("key", "value"):
            x = emit.with_batch(argument(node, role), rank(node), batch, hidden[0])
            set_argument(node, role, emit.chain(x, hidden, rank(x) - 2, batch))
        mask = argument(node, "attn_mask")
        if mask is not None and not is_one(mask, rank(mask) - 1):
            mask = emit.with_batch(mask, rank(node), batch, hidden[0])
            mask = emit.chain(mask, hidden, rank(node) - 1, batch)
        set_argument(node, "attn_mask", mask if seen is None else _masked(emit, mask, seen))
    else:
        scores, values = (next(k for k in attention.keys if k.role == role) for role in ("scores", "value"))
        assert scores.batch is not None
        assert values.batch is not None
        product = nodes[values.user]
        weighed = emit.chain(nodes[scores.node], hidden, scores.axis, scores.batch)
        node.update_arg(0, weighed if seen is None else _masked(emit, weighed, seen))
        product.update_arg(1, emit.chain(nodes[values.node], hidden, values.axis, values.batch))


def _masked(emit: Emitter, mask: fx.Node | None, seen: fx.Node) -> fx.Node:
    """A mask, or scores, that also leave out what is not seen."""
    if mask is None:
        return seen
    if mask.meta["val"].dtype is torch.bool:
        return emit.call(aten.logical_and.default, mask, seen, origin=mask)
    return emit.call(aten.where.ScalarOther, seen, mask, -torch.inf, origin=mask)


def _refresh_weights(emit: Emitter, between: dict[fx.Node, int], keys: fx.Node) -> None:
    """Recompute the values from softmaxes to weighted sums, whose key axis became shorter.

    Args:
        emit: where nodes go.
        between: these values, each with its key axis.
        keys: the index of the keys that are left.
    """
    for node in sorted(between):
        axis = between[node]
        if traits(node.target).sized and axis >= 0:
            sizes = list(node.args[1])  # type: ignore[arg-type]
            if sizes[axis] != -1:
                sizes[axis] = emit.size(keys, 1)
                node.update_arg(1, sizes)
        refresh_value(node)
