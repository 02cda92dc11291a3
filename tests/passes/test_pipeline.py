"""The pass contract and the pipeline: a user's pass is as good as ours, and a broken one is named."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import tokgraph as tg
from tests.passes.tools import Run, assert_well_formed, captured, changes, node, site
from tokgraph.errors import InternalError, PlanError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import call
from tokgraph.passes import GraphPass, PassDelta, Pipeline
from tokgraph.passes.capture.normalize import RemoveNoOps
from tokgraph.passes.contract import pass_name
from tokgraph.passes.rewrite import ExplicitCausalMask, PushDown, SeedSites
from tokgraph.passes.rewrite.realise import rewrite_passes

aten = torch.ops.aten


def gelus(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is aten.gelu.default]


class TanhGelu(PassBase):
    """A pass as torch documents them: gelu by its tanh approximation."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = gelus(graph_module)
        for n in found:
            n.update_kwarg("approximate", "tanh")
        graph_module.recompile()
        return PassResult(graph_module, bool(found))


def negate_twice(module: fx.GraphModule) -> None:
    """A plain function that edits in place and returns nothing."""
    for n in gelus(module):
        with module.graph.inserting_after(n):
            once = call(module.graph, aten.neg.default, n, origin=n, made_by="negate-twice")
        with module.graph.inserting_after(once):
            twice = call(module.graph, aten.neg.default, once, origin=n, made_by="negate-twice")
        n.replace_all_uses_with(twice, lambda user, once=once: user is not once)


def do_nothing(module: fx.GraphModule) -> PassResult:
    return PassResult(module, False)


@dataclass(frozen=True)
class Counting(GraphPass):
    """A pass of ours: an option as a field, for one task."""

    name: ClassVar[str] = "counting"
    task: str | None = None
    limit: int = 10**6

    def requires(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        if len(graph_module.graph.nodes) > self.limit:
            raise PlanError(f"more than {self.limit} nodes")

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        return None


@dataclass(frozen=True)
class Erf(GraphPass):
    """A pass of ours that changes what it finds: gelu by its other approximation."""

    name: ClassVar[str] = "erf"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        for n in gelus(graph_module):
            n.update_kwarg("approximate", "tanh")


def test_a_pass_base_of_a_user_runs_among_ours() -> None:
    found = captured()
    passes = rewrite_passes(found.facts, found.sites(site(0, 1)), exact=True)
    plain = Pipeline(passes).run_task(found.graph, found.facts)
    with_user = Pipeline([*passes[:-1], TanhGelu(), passes[-1]]).run_task(found.graph, found.facts)
    assert [n.kwargs.get("approximate") for n in gelus(with_user.graph_module)] == ["tanh", "tanh"]
    assert 1e-9 < float((Run.of(plain).outputs[0] - Run.of(with_user).outputs[0]).abs().detach()) < 1e-2


def test_a_function_of_a_user_runs_among_ours() -> None:
    """What it inserts is narrowed by push-down like everything else."""
    found = captured()
    masks, seed, *rest = rewrite_passes(found.facts, found.sites(site(0, 1)), exact=True)
    after = Pipeline([masks, seed, negate_twice, *rest]).run_task(found.graph, found.facts)
    Run.of(after).assert_equals(Run.of(found.rewritten(site(0, 1), exact=True)))
    shapes = [tuple(n.meta["val"].shape) for n in after.graph.nodes if n.target is aten.neg.default]
    assert shapes == [(2, 8, 32)] * 2 + [(2, 6, 32)] * 2


def test_the_observer_is_told_of_every_pass() -> None:
    seen: list[tuple[PassDelta, int]] = []

    def observe(delta: PassDelta, graph: tg.TaskGraph) -> None:
        seen.append((delta, len(graph.graph.nodes)))

    found = captured()
    Pipeline([do_nothing, negate_twice, TanhGelu(), Counting()], observe).run(found.program)
    nodes = len(found.graph.graph.nodes)
    assert [delta for delta, _ in seen] == [
        PassDelta("understanding", "do_nothing", False, nodes, nodes),
        PassDelta("understanding", "negate_twice", True, nodes, nodes + 4, {"neg": 4}),
        PassDelta("understanding", "TanhGelu", True, nodes + 4, nodes + 4),
        PassDelta("understanding", "counting", False, nodes + 4, nodes + 4, {}, "exact"),
    ]
    assert all(delta.seconds > 0 for delta, _ in seen)
    assert [count for _, count in seen] == [delta.nodes_after for delta, _ in seen]


def test_passes_for_one_task_leave_the_others_alone() -> None:
    a, b = captured("understanding"), captured("generation")
    program = tg.Program(a.program.spec, {"understanding": a.graph, "generation": b.graph})
    ran: list[tuple[str, str]] = []
    passes = [Counting(task="generation"), Counting(), *rewrite_passes(a.facts, (), exact=True)]
    after = Pipeline(passes, lambda delta, _: ran.append((delta.task, delta.name))).run(program, a.facts_of)
    seeded = "explicit-causal-mask seed-sites uniform-rows push-down part-rows join-rows"
    simplified = "share-duplicates merge-restores causal-attention grouped-heads range-rows take-routed-rows"
    rewrite = [("understanding", name) for name in (*seeded.split(), *simplified.split())]
    assert [r for r in ran if r[0] == "generation"] == [("generation", "counting")] * 2
    assert [r for r in ran if r[0] == "understanding"] == [("understanding", "counting"), *rewrite]
    assert changes(program["generation"], after["generation"]) == ""


def test_the_program_given_stays_as_it_was() -> None:
    found = captured()
    before = str(found.graph.graph)
    after = Pipeline([negate_twice, TanhGelu()]).run(found.program)
    assert str(found.graph.graph) == before
    assert after["understanding"].graph_module is not found.graph.graph_module
    own, copy = (g.named_parameters() for g in (found.graph, after["understanding"]))
    assert own.keys() == copy.keys()
    assert all(own[name] is copy[name] for name in own)
    assert all(own[name] is p for name, p in found.program.model.named_parameters() if name in own)


def test_names() -> None:
    assert pass_name(PushDown()) == "push-down"
    assert pass_name(negate_twice) == "negate_twice"
    assert pass_name(TanhGelu()) == "TanhGelu"


# ------------------------------------------------------------------ what changed, found out and not believed


def boasts(module: fx.GraphModule) -> PassResult:
    return PassResult(module, True)


def denies(module: fx.GraphModule) -> PassResult:
    negate_twice(module)
    return PassResult(module, False)


def copies(module: fx.GraphModule) -> PassResult:
    """Another module with an equal graph."""
    return PassResult(fx.GraphModule(module, copy.deepcopy(module.graph)), True)


@pytest.mark.parametrize("function", [do_nothing, boasts, copies, Counting(), RemoveNoOps()], ids=pass_name)
def test_nothing_is_modified(function: object) -> None:
    """Whatever the pass says."""
    deltas: list[PassDelta] = []
    found = captured()
    after = Pipeline([function], lambda delta, _: deltas.append(delta)).run_task(found.graph)  # type: ignore[list-item]
    assert [d.modified for d in deltas] == [False]
    assert changes(found.graph, after) == ""


def test_a_pass_that_denies_its_changes_is_caught() -> None:
    with pytest.raises(InternalError, match=r"pass denies: it says that it changed nothing.*ran before: do_nothing"):
        Pipeline([do_nothing, denies]).run_task(captured().graph)


def test_a_pass_of_ours_cannot_lie() -> None:
    """It says nothing: called alone, in a pipeline or by torch, its graphs are compared."""
    module = captured().graph.copy().graph_module
    first, second = Erf()(module), Erf()(module)
    assert (first.modified, second.modified) == (True, False)
    managed = PassManager([Erf()])(captured().graph.copy().graph_module)
    assert managed.modified
    assert [n.kwargs["approximate"] for n in gelus(managed.graph_module)] == ["tanh", "tanh"]


def test_what_is_changed_is_compiled_again() -> None:
    """Neither the pass nor its caller has to."""
    found = captured()
    module = found.graph.copy().graph_module
    before = module.code
    assert Erf()(module).graph_module.code != before
    after = Pipeline([negate_twice, Erf()]).run_task(found.graph)
    assert after.graph_module.code.count("aten.neg") == 4
    assert 1e-9 < float((Run.of(after).outputs[0] - Run.of(found.graph).outputs[0]).abs().detach()) < 1e-2


# ------------------------------------------------------------------ facts, and where to stop


def test_passes_are_given_the_facts_of_their_task() -> None:
    a, b = captured("understanding"), captured("generation")
    given: list[TaskFacts | None] = []

    @dataclass(frozen=True)
    class Given(GraphPass):
        name: ClassVar[str] = "given"

        def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
            given.append(facts)

    program = tg.Program(a.program.spec, {"understanding": a.graph, "generation": b.graph})
    Pipeline([Given()]).run(program, {"understanding": a.facts, "generation": b.facts})
    Pipeline([Given()]).run(program)
    assert given == [a.facts, b.facts, None, None]


@pytest.mark.parametrize(
    "needy", [SeedSites("understanding", ()), ExplicitCausalMask("understanding", (0,))], ids=pass_name
)
def test_a_pass_that_needs_facts_says_so(needy: GraphPass) -> None:
    found = captured()
    with pytest.raises(InternalError, match=f"pass {needy.name} needs the facts of the task"):
        needy(found.graph.copy().graph_module)
    with pytest.raises(InternalError, match=f"task understanding: pass {needy.name}: .*needs the facts"):
        Pipeline([needy]).run_task(found.graph)


def test_a_pipeline_stops_after_a_pass() -> None:
    ran: list[str] = []
    passes = [do_nothing, Counting(), negate_twice, Counting(limit=10**5), Erf()]
    Pipeline(passes, lambda delta, _: ran.append(delta.name), stop_after="counting").run(captured().program)
    assert ran == ["do_nothing", "counting", "negate_twice", "counting"]


def test_a_pass_that_a_task_does_not_have_stops_nothing() -> None:
    ran: list[str] = []
    passes = [Counting(task="generation"), Erf()]
    Pipeline(passes, lambda delta, _: ran.append(delta.name), stop_after="counting").run(captured().program)
    assert ran == ["erf"]


def test_metadata_is_kept() -> None:
    """Of what a pass leaves alone: values, places and origins."""
    found = captured()
    after = Pipeline([Counting(), negate_twice, Erf()]).run_task(found.graph)
    assert_well_formed(after, None)
    for n in found.graph.graph.nodes:
        mine = node(after, n.name).meta
        assert mine.keys() == n.meta.keys()
        assert mine.get("nn_module_stack") == n.meta.get("nn_module_stack")
    assert after.graph_module.meta == found.graph.graph_module.meta


# ------------------------------------------------------------------ what breaks


def use_before_definition(module: fx.GraphModule) -> PassResult:
    first, *_, last = gelus(module)
    first.prepend(last)
    return PassResult(module, True)


def no_value(module: fx.GraphModule) -> PassResult:
    (n, *_) = gelus(module)
    with module.graph.inserting_after(n):
        bare = module.graph.call_function(aten.neg.default, (n,))
    n.replace_all_uses_with(bare, lambda user: user is not bare)
    return PassResult(module, True)


def crashes(module: fx.GraphModule) -> PassResult:
    raise ValueError("a bug of the pass")


def refuses(module: fx.GraphModule) -> PassResult:
    raise PlanError("not on this graph", help="take another")


def returns_nonsense(module: fx.GraphModule) -> int:
    return 3


@dataclass(frozen=True)
class PromisesTooMuch(GraphPass):
    """Its postcondition is checked on the result."""

    name: ClassVar[str] = "promises-too-much"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        return None

    def ensures(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        if gelus(graph_module):
            raise InternalError("a gelu is left")


@pytest.mark.parametrize(
    ("broken", "name", "why"),
    [
        (use_before_definition, "use_before_definition", "malformed graph"),
        (no_value, "no_value", "nodes without a value: neg"),
        (crashes, "crashes", "ValueError: a bug of the pass"),
        (returns_nonsense, "returns_nonsense", "returned int, which is no PassResult"),
        (PromisesTooMuch(), "promises-too-much", "a gelu is left"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_broken_pass_is_a_bug_that_is_named(broken: object, name: str, why: str) -> None:
    """With the task, and the passes that ran before."""
    found = captured()
    with pytest.raises(InternalError) as caught:
        Pipeline([RemoveNoOps(), do_nothing, broken]).run(found.program)  # type: ignore[list-item]
    message = str(caught.value)
    assert message.startswith(f"task understanding: pass {name}: ")
    assert why in message
    assert message.endswith("(ran before: remove-no-ops, do_nothing)")


def test_a_refusal_is_no_bug() -> None:
    """The user's error arrives as it was raised."""
    found = captured()
    with pytest.raises(PlanError) as caught:
        Pipeline([do_nothing, refuses]).run(found.program)
    assert str(caught.value) == "error[TG005]: not on this graph\n  help: take another"
    with pytest.raises(PlanError, match="more than 3 nodes"):
        Pipeline([Counting(limit=3)]).run(found.program)


def test_checks_can_be_left_out() -> None:
    found = captured()
    graph = Pipeline([no_value], check=False).run_task(found.graph)
    assert any(n.target is aten.neg.default for n in graph.graph.nodes)
    with pytest.raises(InternalError):
        Pipeline([no_value]).run_task(found.graph)


def test_every_pass_says_whether_it_is_exact() -> None:
    assert PushDown.numerics == "exact"
    assert SeedSites.numerics == "approximate"
    assert Counting.numerics == "exact"


def test_options_are_fields() -> None:
    """Frozen, comparable, and shown by ``repr``."""
    assert Counting(limit=3) == Counting(limit=3) != Counting(limit=4)
    assert "limit=3" in repr(Counting(limit=3))
    with pytest.raises(AttributeError):
        Counting().limit = 4  # type: ignore[misc]
