"""Passes as data: every pass is a name and plain fields, and is made again from them; what counts as a change."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import tokgraph as tg
from tests.passes.tools import captured, changes, node, site
from tokgraph.errors import PlanError
from tokgraph.ir.facts import TaskFacts
from tokgraph.passes import GraphPass, Pipeline, pass_of, registered_passes
from tokgraph.passes.contract import fingerprint
from tokgraph.passes.device import ToDevice
from tokgraph.passes.lower.functional import ChecksToOutputs, CountsToSizes, TensorsToInputs, WritesToOutputs
from tokgraph.passes.lower.scatter import ScattersByIndex
from tokgraph.passes.rewrite import PushDown, SeedSites
from tokgraph.passes.rewrite.realise import rewrite_passes
from tokgraph.report import make_report
from tokgraph.stages import PASSES

aten = torch.ops.aten
OURS = {name: cls for name, cls in registered_passes().items() if cls.__module__.startswith("tokgraph.")}


def instances(cls: type[GraphPass]) -> st.SearchStrategy[GraphPass]:
    """Any pass of a class: its options are drawn by their types."""
    return st.builds(cls, **{f.name: FIELDS[str(f.type)] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def sites() -> st.SearchStrategy[tg.DropSite]:
    return st.builds(
        tg.DropSite,
        task=st.text(),
        start=st.integers(0, 9),
        end=st.none() | st.integers(10, 99),
        keep=st.floats(0, 1),
        selector=st.text(),
        mode=st.sampled_from(["hide", "freeze"]),
        restore=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
        projections=st.sampled_from(["shared", "own"]),
        ragged=st.sampled_from(["min", "pad"]),
    )


FIELDS = {
    "str": st.text(),
    "str | None": st.none() | st.text(),
    "bool": st.booleans(),
    "tuple[int, ...]": st.lists(st.integers()).map(tuple),
    "tuple[DropSite, ...]": st.lists(sites(), max_size=3).map(tuple),
}
"""Type of a pass's field -> its values; a pass with a field of another type gets a row here."""


def test_the_stages_run_every_pass_there_is() -> None:
    others = [
        ToDevice,
        CountsToSizes,
        ScattersByIndex,
        ChecksToOutputs,
        WritesToOutputs,
        TensorsToInputs,
    ]  # after a move, and before compilation
    assert sorted([*PASSES, *(p.name for p in others)]) == sorted(OURS)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_dataclass(name: str) -> None:
    assert dataclasses.is_dataclass(OURS[name])
    assert OURS[name].__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert OURS[name].numerics in ("exact", "approximate")


@given(st.one_of([instances(cls) for cls in OURS.values()]))
def test_a_pass_comes_back_from_its_data(made: GraphPass) -> None:
    """Through JSON text, as on a command line or in a file."""
    again = pass_of(json.loads(json.dumps(made.to_data())))
    assert again == made
    assert type(again) is type(made)
    assert again.to_data() == made.to_data()


def test_what_a_pass_looks_like_as_data() -> None:
    made = SeedSites("understanding", (tg.DropSite("understanding", 1, 2, 0.25),), exact=True)
    drop = {"task": "understanding", "start": 1, "end": 2, "keep": 0.25, "selector": "uniform", "mode": "hide"}
    drop |= {"restore": True, "seed": 0, "projections": "shared", "ragged": "min"}
    assert made.to_data() == {
        "name": "seed-sites",
        "options": {"task": "understanding", "sites": [drop], "exact": True},
    }
    assert PushDown().to_data() == {"name": "push-down", "options": {"task": None}}
    assert pass_of({"name": "push-down"}) == PushDown()


def test_a_run_replays_from_its_report() -> None:
    found = captured()
    accelerated = found.apply(site(0, 1), exact=True)
    report = json.loads(json.dumps(make_report(accelerated)))
    passes = [pass_of(data) for data in report["tasks"][found.task]["passes"]]
    again = Pipeline(passes).run_task(found.graph, found.facts)
    assert changes(accelerated.program[found.task], again) == ""


def test_a_pipeline_replays_from_data() -> None:
    found = captured()
    passes = rewrite_passes(found.facts, found.sites(site(0, 1)), exact=True)
    again = [pass_of(made.to_data()) for made in passes]
    first, second = (Pipeline(p).run_task(found.graph, found.facts) for p in (passes, again))
    assert changes(first, second) == ""
    assert changes(found.graph, second) != ""


BAD = {
    "unknown": ({"name": "magic"}, "no pass is named 'magic'"),
    "no name": ({}, "no pass is named None"),
    "unknown option": ({"name": "push-down", "options": {"speed": 11}}, "pass 'push-down': speed: "),
    "missing option": ({"name": "seed-sites", "options": {"task": "a"}}, "pass 'seed-sites': sites: Field required"),
    "another type": (
        {"name": "seed-sites", "options": {"task": "a", "sites": [], "exact": "true"}},
        "exact: Input should be a valid boolean",
    ),
    "bad site": (
        {"name": "seed-sites", "options": {"task": "a", "sites": [{"task": "a", "start": 0, "colour": 1}]}},
        "pass 'seed-sites': sites.0.colour: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(PlanError) as caught:
        pass_of(data)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="pass 'push-down' is defined twice: PushDown and .*Another"):

        @dataclass(frozen=True)
        class Another(GraphPass):
            name: ClassVar[str] = "push-down"

            def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
                return None

    assert registered_passes()["push-down"] is PushDown


# ------------------------------------------------------------------ what counts as a change


def rename(graph: fx.Graph) -> None:
    node(graph, "gelu")._rename("other")


def retarget(graph: fx.Graph) -> None:
    node(graph, "gelu").target = aten.relu.default


def another_argument(graph: fx.Graph) -> None:
    n = next(n for n in graph.nodes if n.target is aten.layer_norm.default)
    n.update_arg(4, float(n.args[4]) * 2)  # type: ignore[arg-type]


def another_type(graph: fx.Graph) -> None:
    """Equal in Python, not in a graph."""
    n = next(n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert n.args[5] is True
    n.update_arg(5, 1)


def another_keyword(graph: fx.Graph) -> None:
    node(graph, "gelu").update_kwarg("approximate", "tanh")


def another_input(graph: fx.Graph) -> None:
    n = node(graph, "gelu")
    n.update_arg(0, n.args[0].args[0])  # type: ignore[union-attr]


def another_order(graph: fx.Graph) -> None:
    graph.output_node().prepend(node(graph, "gelu"))


def another_output(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = (tuple(reversed(output.args[0])),)  # type: ignore[arg-type]


def another_attribute(graph: fx.Graph) -> None:
    next(n for n in graph.nodes if n.op == "get_attr").target = "layers.1.norm1.bias"


def one_more(graph: fx.Graph) -> None:
    with graph.inserting_after(node(graph, "gelu")):
        graph.call_function(aten.neg.default, (node(graph, "gelu"),))


EDITS = [
    rename, retarget, another_argument, another_type, another_keyword, another_input, another_order, another_output,
    another_attribute, one_more,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_edit_is_seen(edit: Callable[[fx.Graph], None]) -> None:
    graph = captured().graph.copy().graph
    before = fingerprint(graph)
    assert fingerprint(graph) == fingerprint(copy.deepcopy(graph)) == before
    edit(graph)
    assert fingerprint(graph) != before
