"""Selectors of the user's own: they choose as the oracle says, cannot look ahead, and fail with a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny
from tests.planning.facts import G, U, facts
from tokgraph.ir.plan import DropSite
from tokgraph.planning import selectors
from tokgraph.planning.check import check_plan


@pytest.fixture(scope="module")
def three() -> Captured:
    return captured_tiny(3)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Registers for one test."""
    monkeypatch.setattr(selectors, "_SELECTORS", selectors.selectors())

    def add(name: str, score: Callable[[torch.Tensor], torch.Tensor], causal: bool) -> None:
        tg.register_selector(name, causal=causal)(score)

    return add


def spread(rows: torch.Tensor) -> torch.Tensor:
    """How much a row's features differ."""
    return rows.var(-1)


FURTHER: list[dict[str, object]] = [{"mode": "freeze"}, {"restore": False}]
"""Sites of other kinds."""


def middle(positions: torch.Tensor) -> torch.Tensor:
    """The centre of the image first."""
    return -(positions - positions.float().mean()).abs()


def plan(task: str, name: str, **more: object) -> tg.Plan:
    site = DropSite(task, 1, 2, 0.5, name, **more)  # type: ignore[arg-type]
    return check_plan(tg.Plan((site,), exact=True), facts(3))


@pytest.mark.parametrize("more", [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in FURTHER)], ids=str)
def test_the_oracle_agrees(three: Captured, register, more: dict[str, object]) -> None:
    register("spread", spread, causal=False)
    register("middle", middle, causal=True)
    for task, name in ((U, "spread"), (U, "middle"), (G, "middle")):
        if task == G and "restore" in more:
            continue  # generation demands every visual row
        accelerated = three.apply(plan(task, name, **more))
        tg.verify(three.program, accelerated).raise_if_failed()
        assert f"{name}_scores" in accelerated[task].graph_module.code


def test_it_chooses_by_score(three: Captured, register) -> None:
    register("middle", middle, causal=True)
    accelerated = three.apply(plan(G, "middle"))
    module = accelerated[G].graph_module
    (index,) = [n for n in module.graph.nodes if n.target is torch.ops.tokgraph.keep_rows.default]
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n is index:
                seen["kept"] = result
            return result

    Watch(module).run(*accelerated[G].task_graph.flatten(three.spec.tasks[G].inputs))
    text = list(range(tiny.TEXT))
    assert seen["kept"].tolist() == [[*text, *(tiny.TEXT + i for i in (1, 2, 3))]] * 2  # of 2, 3 | 1, 4: the earlier


def test_a_wrong_choice_is_noticed(three: Captured, register) -> None:
    """The oracle scores one sample at a time: a function that mixes samples does not pass."""
    register("mixing", lambda rows: rows.var(-1) * torch.tensor([1.0, -1.0]).unsqueeze(1)[: len(rows)], causal=False)
    accelerated = three.apply(plan(U, "mixing"))
    assert not tg.verify(three.program, accelerated).passed


def test_no_gradient_flows_through_a_choice(three: Captured, register) -> None:
    seen = []

    def spy(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.requires_grad)
        return rows.var(-1)

    register("spy", spy, causal=False)
    three.apply(plan(U, "spy"))[U](**three.spec.tasks[U].inputs)
    assert seen
    assert not any(seen)


def test_one_that_sees_rows_is_refused_on_generation(register) -> None:
    register("spread", spread, causal=False)
    with pytest.raises(tg.PlanError, match="'spread' is not causal, and task 'generation' predicts visual tokens"):
        plan(G, "spread")


def test_plan_files_name_it(register, tmp_path) -> None:
    register("middle", middle, causal=True)
    plan(G, "middle").save(tmp_path / "plan.json")
    assert tg.Plan.load(tmp_path / "plan.json").sites[0].selector == "middle"


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(tg.PlanError, match="selector 'middle' is unknown") as error:
        plan(G, "middle")
    assert error.value.help is not None
    assert "tokgraph.register_selector" in error.value.help


@pytest.mark.parametrize("name", ["uniform", "attention", "twice"])
def test_names_are_taken_once(register, name: str) -> None:
    register("twice", spread, causal=False)
    with pytest.raises(tg.PlanError, match=f"there is a selector '{name}' already"):
        register(name, middle, causal=True)


def test_a_module_may_be_loaded_again(register) -> None:
    register("spread", spread, causal=False)
    register("spread", spread, causal=False)


def branching(rows: torch.Tensor) -> torch.Tensor:
    return rows.var(-1) if rows.sum() > 0 else rows.norm(dim=-1)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda rows: rows.sum(), r"returned \(\) for scores of shape"),
        (lambda rows: rows, "returned .* for scores of shape"),
        (lambda rows: None, "returned NoneType for scores of shape"),
        (lambda rows: rows @ rows, "failed on a tensor of shape"),
        (branching, "failed on a tensor of shape"),
    ],
)
def test_functions_that_do_not_work(three: Captured, register, score, message: str) -> None:
    register("broken", score, causal=False)
    with pytest.raises(tg.PlanError, match=f"(?s)selector 'broken' {message}"):
        three.apply(plan(U, "broken"))
