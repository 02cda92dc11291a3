"""Whether sites can be placed by depth: block numbers must be layer numbers, in every task."""

from __future__ import annotations

from collections.abc import Iterable

from tokgraph.errors import PlanError, Where
from tokgraph.ir.blocks import Block
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.plan import DropSite


def check_placed(facts: Facts, tasks: Iterable[str]) -> None:
    """Check that block numbers are layer numbers, so that sites can be placed by them.

    Args:
        facts: the facts.
        tasks: names of the tasks that get sites.

    Raises:
        PlanError: attentions over the token axis of such a task are in no block, or in one block with those of other
            layers; or something that is added between two blocks may be part of either.
    """
    for name in tasks:
        task = facts[name]
        if task.unplaced:
            first = task.unplaced[0]
            raise PlanError(
                f"task {name!r}: no site can be placed by depth: {undivided(task)}, so block numbers are not layer numbers"
                + (f" ({task.unfound})" if task.unfound else ""),
                where=Where(first.node, module=first.module or None, source=first.source),
                help="layers cannot be told apart where no few values with a token axis lead from one to the next, where the "
                "tokens between them change, or where one module is used several times; the policies none and exact place no "
                "sites",
            )
        if task.between:
            part = task.between[0]
            raise PlanError(
                f"task {name!r}: no site can be placed by depth: {part.module} adds to the residual stream between two layers, "
                "outside of their modules, and nothing tells to which of them it belongs",
                where=Where(part.node, module=part.module, source=part.source),
                help="call it in the forward of the layer's module, or give it the layer's number; the policies none and exact "
                "place no sites",
            )


def undivided(task: TaskFacts) -> str:
    """Which attentions of a task are in no block of their own layer, and where, as a clause."""
    total = len({a.node for block in task.blocks for a in block.attention} | {u.node for u in task.unplaced})
    clauses = []
    for index in dict.fromkeys(u.block for u in task.unplaced):
        mine = [u for u in task.unplaced if u.block == index]
        places = dict.fromkeys(u.module or u.node for u in mine)
        first, last = (list(places)[i] for i in (0, -1))
        shown = first if len(places) == 1 else f"{first} .. {last}"
        found = "the 1 block" if len(task.blocks) == 1 else f"the {len(task.blocks)} blocks"
        clauses.append(
            f"{len(mine)} of {total} attentions over the token axis lie outside of {found} found ({shown})"
            if index is None
            else f"block {index} holds {len(mine)} of {total} attentions over the token axis, one after the other ({shown})"
        )
    return "; ".join(clauses)


def check_same_layers(facts: Facts) -> None:
    """Check that blocks of one number are one layer in all tasks: parameters that tasks share are read in the same blocks.

    Raises:
        PlanError: a block of one task reads what another block of another task reads.
    """
    depth = min(len(task.blocks) for task in facts.values())
    (first, reference), *others = ((name, _readers(task, depth)) for name, task in facts.items())
    for name, readers in others:
        for tensor, blocks in readers.items():
            if tensor in reference and reference[tensor] != blocks:
                raise PlanError(
                    f"the tasks go through different layers in blocks of the same number: {tensor} is read in "
                    f"{_numbers(reference[tensor])} of task {first!r} and in {_numbers(blocks)} of task {name!r}, so the same "
                    "span is not the same layers",
                    help="write a plan with spans of its own for each task, or let the tasks run through the same layers",
                )


def check_read_behind(facts: Facts, sites: Iterable[DropSite]) -> None:
    """Check that tokens behind every span still look at what image tokens became in it, in every task.

    Where later layers look at keys of earlier ones only, nobody reads the image rows of a span but the loss that predicts
    them: work on them is no work of the other tasks, and to drop the same rows would thin the tasks differently.

    Raises:
        PlanError: behind a span no block makes keys of its own.
    """
    for site in sites:
        task = facts[site.task]
        end = len(task.blocks) if site.end is None else site.end
        known = [any(a.keys for a in block.attention) for block in task.blocks]
        own = [block.index for block in task.blocks if _own_keys(block)]
        if any(known) and not any(index >= end for index in own):
            last = own[-1] if own else 0
            raise PlanError(
                f"task {site.task!r}: no block behind block {end - 1} makes keys and values of its own tokens, so image tokens "
                "there are read by the loss alone, which differs from task to task",
                help=f"end the span at block {last} or before, or write a plan with sites of its own for each task",
            )


def _own_keys(block: Block) -> bool:
    """Whether a block's attention looks at keys and values that the block makes, and not at those of an earlier one."""
    inside = set(block.nodes)
    return any(k.node in inside for a in block.attention for k in a.keys if k.role in ("key", "value"))


def _readers(task: TaskFacts, depth: int) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer -> numbers of the first ``depth`` blocks that read it."""
    found: dict[str, tuple[int, ...]] = {}
    for block in task.blocks[:depth]:
        for name in block.tensors:
            found[name] = (*found.get(name, ()), block.index)
    return found


def _numbers(blocks: tuple[int, ...]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"
