"""How stages are called: with facts or accelerated programs, which know their program, or with the program before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny
from tokgraph.passes.lower import places_of


@pytest.fixture(scope="module")
def three() -> Captured:
    return captured_tiny(3)


@pytest.fixture(scope="module")
def other() -> tg.Program:
    """The same tasks of another model."""
    spec = tiny.build(layers=3)
    return tg.capture(tg.ModelSpec(tiny.Unified(3), spec.tasks))


def test_the_program_may_stand_before_what_knows_it(three: Captured) -> None:
    program, facts = three.program, three.facts
    plan = tg.make_plan(facts, "exact")
    assert tg.make_plan(program=program, policy="exact", facts=facts) == plan
    accelerated = tg.apply(program=program, plan=plan, facts=facts)
    assert accelerated.facts is facts
    assert tg.verify(program, accelerated=accelerated) == tg.verify(accelerated)
    assert tg.summarise(program, facts) == tg.summarise(facts)
    batches = {"generation": [dict(three.spec.tasks["generation"].inputs)]}
    measured = [tg.measure(facts, batches), tg.measure(program, facts, batches=batches)]
    masses = [m.tasks["generation"].allocation.mass for m in measured]
    assert torch.equal(*masses)


def test_what_belongs_to_another_program_is_refused(three: Captured, other: tg.Program) -> None:
    plan = tg.make_plan(three.facts, "exact")
    with pytest.raises(tg.VerificationError, match="made from another program"):
        tg.verify(other, tg.apply(three.facts, plan))
    with pytest.raises(tg.AnalysisError, match="of another program"):
        tg.apply(other, plan, facts=three.facts)
    with pytest.raises(tg.AnalysisError, match="of another program"):
        tg.measure(other, three.facts)


@pytest.mark.slow
def test_a_loaded_program_is_verified_against_the_one_that_is_given(other: tg.Program, tmp_path) -> None:
    own = Captured.of(tiny.build(layers=3))  # saving traces again, in a capture that no other test has used
    own.apply(tg.Plan(exact=True)).save(tmp_path / "saved", with_baseline=False)
    loaded = tg.load_accelerated(tmp_path / "saved")
    assert tg.verify(own.program, loaded).passed
    assert not tg.verify(other, loaded).passed


def test_calls_without_facts_say_what_is_missing(three: Captured) -> None:
    with pytest.raises(TypeError, match=r"give the accelerated program: verify\(accelerated\)"):
        tg.verify(three.program)
    with pytest.raises(TypeError, match="give the facts of the program"):
        tg.measure(three.program)
    with pytest.raises(TypeError, match="give them once"):
        tg.make_plan(three.facts, "exact", facts=three.facts)


def test_nodes_of_a_users_own_pass_have_places(three: Captured) -> None:
    """So that profiles know where their time belongs."""
    accelerated = three.apply(tg.Plan(exact=True))
    program = accelerated.program.copy()
    for graph in program.values():
        first = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
        with graph.graph.inserting_after(first):
            copied = graph.graph.call_function(torch.ops.aten.clone.default, (first,))
        copied.meta.update({"val": first.meta["val"], "nn_module_stack": first.meta["nn_module_stack"]})
        first.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)
        graph.graph_module.recompile()
    mine = accelerated.with_program(program)
    for graph in mine.program.values():
        calls = {node.name for node in graph.graph.nodes if node.op == "call_function"}
        assert places_of(graph).keys() == calls
    tg.verify(mine).raise_if_failed()


def test_a_policy_that_defines_plan_is_one(three: Captured) -> None:
    """As policies of other packages did before options were checked where they are stated."""

    @dataclass(frozen=True)
    class Before(tg.Policy):
        name: ClassVar[str] = "test-before"
        keep: float = 0.5

        def plan(self, facts: tg.Facts) -> tg.Plan:
            return self.made([tg.DropSite(task, 1, 2, self.keep) for task in facts], True)

    assert [site.keep for site in tg.make_plan(three.facts, "test-before", keep=0.25).sites] == [0.25, 0.25]
    with pytest.raises(tg.PlanError, match="keep"):
        Before(keep="much")  # type: ignore[arg-type]


class Odd(tiny.Unified):
    """Holds a tensor that is no buffer where export puts constants, and one under a name of ours."""

    def __init__(self, name: str) -> None:
        super().__init__(1)
        self._constants = nn.Module()
        self._constants.lifted_tensor_0 = torch.tensor(3.0)  # type: ignore[assignment]
        if name:
            setattr(self, name, torch.tensor(3.0))
        self.extra = name


def scaled(model: Odd, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    loss, _ = tiny.generate(model, ids, codes)
    scale = model._constants.lifted_tensor_0 * torch.tensor([0.5, 0.5]).sum()
    return loss * scale * (getattr(model, model.extra) if model.extra else 1.0)


def odd_spec(name: str) -> tg.ModelSpec:
    torch.manual_seed(0)
    inputs = tiny.build(layers=1).tasks["generation"].inputs
    return tg.ModelSpec(Odd(name), {"t": tg.Task(scaled, inputs, visual_inputs=("codes",), reads="visual")})


def test_constants_of_the_code_hide_no_tensor_of_the_model() -> None:
    spec = odd_spec("")
    loss = tg.apply(tg.capture(spec), tg.Plan())["t"](**spec.tasks["t"].inputs)
    torch.testing.assert_close(loss, scaled(spec.model, **spec.tasks["t"].inputs))  # type: ignore[arg-type]


def test_a_tensor_that_is_no_buffer_may_not_have_a_name_of_ours() -> None:
    with pytest.raises(tg.SpecError, match="'tokgraph_step', a name that is reserved"):
        tg.capture(odd_spec("tokgraph_step"))


def test_a_plan_that_is_applied_in_autocast_is_the_same(three: Captured) -> None:
    """Values of new nodes, and so costs and estimates, are those of the graph's own region."""
    plan = tg.make_plan(three.program, "shared", facts=three.facts)

    def values(program: tg.Program) -> list[str]:
        nodes = [node for graph in program.values() for node in graph.graph.nodes]
        return [str(getattr(node.meta.get("val"), "dtype", None)) for node in nodes]

    outside = values(three.apply(plan).program)
    with torch.autocast("cpu", torch.bfloat16):
        assert values(three.apply(plan).program) == outside
