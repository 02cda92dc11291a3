"""What drops move in memory, counted without running anything: beside a loop written by hand that drops the same rows.

Models live on the meta device: graphs are captured, rewritten and counted without weights. One training step, forward and
backward, of `examples/janus.py`. A row operator takes rows out, puts them back, or puts two sets of rows together; its bytes
are those that it reads and writes, indices left out.

    python benchmarks/static_budget.py
    python benchmarks/static_budget.py --size tiny --layers 4

The loop is counted by formula, from the plan's sites, as a careful user would write it (`hand_loop.py` has it for spans):

- of a span, the stream and the two rotary embeddings are taken once and the stream is put back once; a span is the blocks
  between which the same rows stay, so random-LTD has one for each block;
- of a frozen span, text and visual rows are taken once, keys and values are put one after the other in each block (attention
  does not ask for their order; mask and rotary embeddings are put in that order once), and text rows are put back once;
- where visual rows have projections of their own in a block without drops, they are taken apart from the text before these
  projections, and put together after each;
- where rows never come back, the block before the span computes its queries and its feed-forward of the rows that stay; a
  selector by attention takes the prompt's query there;
- in the last block, `exact` takes stream, queries' input, rotary embeddings and mask of the rows that the loss reads.

Rows that stand side by side at the same positions in every sample (the image of generation, the text before it) are a slice,
which moves nothing; its gradient is put into zeros. Other rows are gathered.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tokgraph as tg
from tokgraph.ir.blocks import Block
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument
from tokgraph.passes.cost.moves import drop_overhead

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"
POLICIES = ("none", "exact", "shared", "fastv", "himix", "hmgen", "random-ltd")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass
class Loop:
    """The row operators of a loop written by hand for one task.

    Args:
        batch: samples.
        tokens: of a sample.
        visual: visual ones among them.
        width: of the residual stream.
        heads: of attention.
        item: bytes of a number.
        side_by_side: whether the visual rows are the last ones of every sample.
        widths: weight of a projection -> width of what it makes.
        moved: bytes of each operator.
        masked: attentions that read a mask.
    """

    batch: int
    tokens: int
    visual: int
    width: int
    heads: int
    item: int
    side_by_side: bool
    widths: dict[str, int]
    moved: list[int] = field(default_factory=list)
    masked: int = 0

    def rows(self, count: int) -> int:
        """Bytes of so many rows of the stream."""
        return self.batch * count * self.width * self.item

    def take(self, count: int, of: int, is_slice: bool) -> None:
        """Rows of the stream, and the gradient put back into zeros."""
        self.moved.append((0 if is_slice else 2 * self.rows(count)) + self.rows(of) + 2 * self.rows(count))

    def put(self, count: int, into: int, is_slice: bool) -> None:
        """Rows back into the stream: a concatenation with the others, or a copy of the stream with the rows written."""
        rows, stream = self.rows(count), self.rows(into)
        self.moved.append(2 * stream + stream + 2 * (stream - rows) if is_slice else 4 * stream + 5 * rows)

    def join(self, weight: str) -> None:
        """Two sets of rows of a projection, one after the other; the gradient is two slices."""
        self.moved.append(2 * self.rows(self.tokens) * self.widths[weight] // self.width)

    def take_embeddings(self, count: int, is_slice: bool, shared: bool = False) -> None:
        """Rows of cosines and sines, which no gradient reaches; ``shared``: one set for all samples."""
        samples = 1 if shared else self.batch
        size = 0 if is_slice else 2 * samples * count * self.width // self.heads * self.item
        self.moved += [size, size]

    def take_mask(self, count: int, keys: int, is_slice: bool) -> None:
        """Rows of a mask of booleans, which an attention then reads."""
        self.masked += 1
        self.moved.append(0 if is_slice else 2 * self.batch * count * keys)


def by_hand(loop: Loop, sites: tuple[tg.DropSite, ...], facts: TaskFacts, exact: bool) -> Loop:
    """Fill a loop with what the sites, resolved, and `exact` make it move."""
    text, left, embedded, frozen = loop.tokens - loop.visual, loop.tokens, False, False
    for site in sites:
        assert site.end is not None
        kept = text + site.kept(loop.visual)
        inside = facts.blocks[site.start : site.end]
        if site.mode == "freeze":
            _frozen(loop, inside)
            frozen = site.end == len(facts.blocks)
        elif site.projections == "own" and kept == loop.tokens:
            for block in inside:
                loop.take(text, loop.tokens, loop.side_by_side)
                loop.take(loop.visual, loop.tokens, loop.side_by_side)
                for projection in block.projections:
                    loop.join(projection.weight)
        elif site.restore:
            at_end = loop.side_by_side and kept == text
            loop.take(kept, loop.tokens, at_end)
            if not (at_end and embedded):  # the same rows at each of the sites
                loop.take_embeddings(kept, at_end, loop.side_by_side and site.selector == "uniform")
            embedded = at_end
            loop.put(kept, loop.tokens, at_end)
        else:
            left = _gone(loop, site, facts)
    if exact:
        rows = facts.windows[0].demanded if facts.windows else facts.demand.rows
        _last_block(loop, rows, left, frozen)
    return loop


def _frozen(loop: Loop, blocks: Sequence[Block]) -> None:
    text = loop.tokens - loop.visual
    loop.take(text, loop.tokens, loop.side_by_side)
    loop.take(loop.visual, loop.tokens, loop.side_by_side)
    loop.take_embeddings(text, loop.side_by_side)
    loop.take_embeddings(loop.tokens, is_slice=False)
    loop.take_mask(text, loop.tokens, loop.side_by_side)
    loop.masked += len(blocks) - 1
    for block in blocks:
        for projection in block.projections:
            if projection.keys:
                loop.join(projection.weight)
    loop.put(text, loop.tokens, loop.side_by_side)


def _gone(loop: Loop, site: tg.DropSite, facts: TaskFacts) -> int:
    """Rows that leave for good; returns how many are left."""
    demanded = facts.demand.visual
    left = loop.tokens - loop.visual + demanded + max(site.kept(loop.visual) - demanded, 0)
    if site.selector == "attention":
        loop.take(1, loop.tokens, is_slice=False)
    loop.take(left, loop.tokens, is_slice=False)
    loop.take(left, loop.tokens, is_slice=False)
    loop.take_mask(left, loop.tokens, is_slice=False)
    loop.take_embeddings(left, is_slice=False)
    return left


def _last_block(loop: Loop, rows: int, of: int, frozen: bool) -> None:
    """What `exact` takes: of a frozen block, whose queries are text alone, the stream after it."""
    loop.take(rows, of, loop.side_by_side)
    if not frozen:
        loop.take(rows, of, loop.side_by_side)
        loop.take_embeddings(rows, loop.side_by_side)
        loop.take_mask(rows, of, loop.side_by_side)


@dataclass(frozen=True)
class Row:
    """One task under one policy.

    Args:
        policy: the policy.
        task: the task.
        operators: row operators.
        moved: bytes that they move in a step.
        loop_operators: those of the loop by hand.
        loop_moved: their bytes.
        masked: attentions that read a mask.
        causal: attentions that are told to be causal.
        open: attentions that hide nothing.
        loop_masked: attentions of the loop by hand that read a mask.
    """

    policy: str
    task: str
    operators: int
    moved: int
    loop_operators: int
    loop_moved: int
    masked: int
    causal: int
    open: int
    loop_masked: int

    @property
    def ratio(self) -> float:
        """Bytes beside those of the loop."""
        return self.moved / self.loop_moved if self.loop_moved else 1.0


def kernels(graph: tg.TaskGraph) -> tuple[int, int, int]:
    """Attentions that read a mask, that are told to be causal, and that hide nothing."""
    nodes = graph.graph.find_nodes(op="call_function", target=_ATTENTION)
    masked = sum(argument(node, "attn_mask") is not None for node in nodes)
    causal = sum(bool(argument(node, "is_causal", False)) for node in nodes)
    return masked, causal, len(nodes) - masked - causal


def budget(facts: tg.Facts, policies: Iterable[str] = POLICIES) -> list[Row]:
    """A row for each policy and task of Janus.

    Args:
        facts: of a Janus whose understanding takes no attention mask.
        policies: names of policies, with their default options.
    """
    spec = facts.program.spec
    config = spec.model.config.text_config
    widths = {name: parameter.shape[0] for name, parameter in spec.model.named_parameters()}
    found = []
    for policy in policies:
        plan = tg.make_plan(facts, policy)
        program = tg.apply(facts, plan).program
        for task, graph in program.items():
            known = facts[task]
            loop = Loop(
                next(iter(spec.tasks[task].inputs.values())).shape[0],
                known.demand.tokens,
                known.visual.count,
                config.hidden_size,
                config.num_attention_heads,
                next(spec.model.parameters()).element_size(),
                side_by_side=known.visual.kind == "range",
                widths=widths,
            )
            sites = tuple(site.resolved(len(known.blocks)) for site in plan.for_task(task))
            by_hand(loop, sites, known, plan.exact)
            overhead = drop_overhead(graph)
            moved = sum(overhead["bytes"].values())
            counts = (overhead["operators"], moved, len(loop.moved), sum(loop.moved))
            found.append(Row(policy, task, *counts, *kernels(graph), loop.masked))
    return found


def markdown(rows: Iterable[Row]) -> str:
    """The table."""
    lines = [
        "| policy | task | row operators | loop | MiB moved | loop | bytes / loop | attention: masked, causal, open "
        "| loop: masked |",
        "|" + " --- |" * 9,
    ]
    for row in rows:
        lines.append(
            f"| `{row.policy}` | {row.task} | {row.operators} | {row.loop_operators} | {row.moved / 2**20:.1f} "
            f"| {row.loop_moved / 2**20:.1f} | {row.ratio:.2f} | {row.masked}, {row.causal}, {row.open} "
            f"| {row.loop_masked} |"
        )
    return "\n".join(lines)


def captured(size: str, layers: int | None, batch: int = 2) -> tg.Facts:
    """Facts of a Janus on the meta device, without padding."""
    return tg.analyze(tg.capture(tg.load(JANUS, size=size, layers=layers, batch=batch, padded=False, device="meta")))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1b", help="size of examples/janus.py (default: 1b)")
    parser.add_argument("--layers", type=int, help="decoder layers, if other than the size's")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    print(markdown(budget(captured(options.size, options.layers, options.batch))))


if __name__ == "__main__":
    main()
