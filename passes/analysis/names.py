"""Names of blocks: where the module stack does not say them, since a model calls parts of its layers, their list does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokgraph.ir.blocks import Block

from .units import list_of


def named(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Blocks, each with the name of its item of the layers' list, if modules have not told it.

    It is the list of which every block reads tensors of one item, and no two of the same: a model that adds to the stream
    itself, as ``x = x + layer.attend(layer.norm(x))``, calls the parts of ``layers[i]`` and never the layer. Of several such
    lists it is the one with most tensors.
    """
    items = [_items(block) for block in blocks]
    shared = set.intersection(*map(set, items)) if items else set()
    lists = [
        of for of in shared if len({next(iter(found[of])) for found in items if len(found[of]) == 1}) == len(blocks)
    ]
    if len(blocks) < 2 or not lists:
        return tuple(blocks)
    layers = max(sorted(lists), key=lambda of: sum(_count(block, of) for block in blocks))
    return tuple(_as_item(block, *found[layers]) for block, found in zip(blocks, items, strict=True))


def _items(block: Block) -> dict[str, set[str]]:
    """List of modules -> its items of which a block reads tensors."""
    found: dict[str, set[str]] = {}
    for name in block.tensors:
        of = list_of(name)
        if of:
            found.setdefault(of, set()).add(".".join(name.split(".")[: of.count(".") + 2]))
    return found


def _count(block: Block, of: str) -> int:
    return sum(name.startswith(of + ".") for name in block.tensors)


def _as_item(block: Block, item: str) -> Block:
    return block if (block.module + ".").startswith(item + ".") else replace(block, module=item)
