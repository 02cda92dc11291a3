"""Facts made by hand, so that policies plan without a capture, and what their plans cost, by hand as well."""

from __future__ import annotations

from functools import cache

import tokgraph as tg
from tokgraph.ir.blocks import Block, Projection
from tokgraph.ir.cost import NodeCost, Region, TaskCost, Work
from tokgraph.ir.facts import Demand, KnownAccounts, Prompt, VisualFlow
from tokgraph.ir.sizes import Sizes, expression

U, G = "understanding", "generation"
TEXT = 5
LINEAR, SQUARE, HEAD = 3000, 20, 900
"""FLOPs of a block for each row, of a block for each pair of rows, and of the head for each row."""


def block(index: int) -> Block:
    """A block that makes queries, keys and values by one linear layer."""
    qkv = Projection(f"qkv_{index}", f"layers.{index}.qkv.weight", None, keys=True)
    return Block(index, f"layers.{index}", f"h_{index}", f"h_{index + 1}", (f"qkv_{index}",), (), (qkv,))


def flops(rows: float) -> float:
    """What a block costs for so many rows."""
    return LINEAR * rows + SQUARE * rows**2


def task(name: str, blocks: int = 4, visual: int = 6, most: int = 0) -> tg.TaskFacts:
    """A task with ``TEXT`` text tokens; generation predicts the visual ones.

    Args:
        name: ``U`` or ``G``.
        blocks: its depth.
        visual: visual tokens of a sample, the fewest.
        most: the most; 0: all samples have as many.
    """
    tokens, generates = TEXT + visual, name == G
    demanded = visual if generates else TEXT
    demand = Demand("visual" if generates else "text", demanded, visual if generates else 1, tokens, even=True)
    flow = VisualFlow("range", "h_0", visual, 1, start=TEXT, most=most)
    accounts = KnownAccounts({}, cost(name, blocks, tokens, tokens), cost(name, blocks, tokens, demanded))
    layers = tuple(map(block, range(blocks)))
    prompt = None if generates else Prompt("labels", -100, 0)
    return tg.TaskFacts(name, "h_0", layers, flow, demand, (), (), {}, accounts, prompt)


def cost(name: str, blocks: int, tokens: int, last: int) -> TaskCost:
    """The cost of a step, whose last block and head compute ``last`` rows only."""

    def node(what: str, region: Region, index: int | None, amount: int, degree: int) -> NodeCost:
        return NodeCost(what, what, "", region, index, Work(forward_flops=amount), 0, 0, degree)

    nodes = []
    for index in range(blocks):
        rows = last if index == blocks - 1 else tokens
        nodes.append(node(f"linear_{index}", "block", index, LINEAR * rows, 1))
        nodes.append(node(f"scores_{index}", "block", index, SQUARE * rows**2, 2))
    nodes.append(node("head", "head", None, HEAD * last, 1))
    names = {"batch": expression(2), "tokens": expression(tokens), "visual": expression(tokens - TEXT)}
    return TaskCost(name, tuple(nodes), Sizes(name, names, {}))


@cache
def facts(blocks: int = 4, visual: int = 6) -> tg.Facts:
    """Both tasks, alike."""
    return tg.Facts({name: task(name, blocks, visual) for name in (U, G)})


def ratio(known: tg.Facts, plan: tg.Plan, mix: dict[str, float] | None = None) -> float:
    """FLOPs of a plan of disjoint sites between the first and the last block, relative to those of the captured program."""
    weights = dict.fromkeys(known, 1.0) if mix is None else mix
    before = after = 0.0
    for name, weight in weights.items():
        tokens, visual = known[name].demand.tokens, known[name].visual.count
        before += weight * known[name].cost.at().total().flops
        after += weight * (known[name].exact_cost if plan.exact else known[name].cost).at().total().flops
        for site in plan.for_task(name):
            assert site.end is not None
            assert 0 < site.start < site.end < len(known[name].blocks)
            dropped = visual - site.kept(visual)
            after -= weight * (site.end - site.start) * (flops(tokens) - flops(tokens - dropped))
    return after / before
