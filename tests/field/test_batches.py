"""Batches that differ from the example: as eager, or a BatchError before any kernel runs, with the line that branched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field.models import OPEN, VLM, assert_same, batch, cross_entropy, seeded, spec, understanding


def branches(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids, patches)
    if ids.shape[1] > 12:  # long inputs are scaled
        logits = logits * 2
    if ids.shape[0] % 2 == 0:  # and even batches shifted
        logits = logits + labels.shape[0]
    return cross_entropy(logits, labels)


@pytest.fixture(scope="module")
def branching() -> tg.Accelerated:
    return tg.optimize(spec(seeded(VLM), branches, dynamic=OPEN), "exact", verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 4), (2, 4, 4), (4, 2, 2)])
def test_batches_on_the_captured_side_of_a_branch_are_right(sizes: tuple[int, ...], branching: tg.Accelerated) -> None:
    b = batch(*sizes, seed=4)
    assert_same(branching.model, lambda: branches(branching.model, **b), lambda: branching["u"](**b))


@pytest.mark.parametrize(
    ("sizes", "relation", "line"),
    [((2, 6, 6), r"ids\[1\] <= 12", "if ids.shape[1] > 12"), ((3, 2, 4), r"ids\[0\]", "if ids.shape[0] % 2 == 0")],
)
def test_the_other_side_is_refused_with_the_line(
    sizes: tuple[int, ...], relation: str, line: str, branching: tg.Accelerated
) -> None:
    with pytest.raises(tg.TokgraphError, match=relation) as raised:
        branching["u"](**batch(*sizes))
    assert raised.value.code == "TG007"
    file, _, number = raised.value.where.source.rpartition(":")
    assert line in Path(file).read_text().splitlines()[int(number) - 1]


def test_guards_are_in_the_facts_and_survive_saving(branching: tg.Accelerated, tmp_path: Path) -> None:
    task = tg.summarise(branching.facts)["tasks"]["u"]["taken_for_granted"]
    assert {"ids[1] <= 12"} <= {guard["relation"] for guard in task["guards"]}
    branching.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    b = batch(4, 2, 2, seed=4)
    torch.testing.assert_close(loaded["u"](**b), branching["u"](**b))
    for sizes in ((2, 6, 6), (3, 2, 4)):
        with pytest.raises(tg.TokgraphError) as raised:
            loaded["u"](**batch(*sizes))
        assert raised.value.code == "TG007"


def test_a_saved_program_is_of_one_mode(tmp_path: Path) -> None:
    acc = tg.optimize(spec(seeded(lambda: VLM(dropout=0.3))), "exact", verify=False)
    acc.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    loaded["u"](**batch())
    loaded.eval()
    with pytest.raises(tg.TokgraphError, match="was in training mode, it is in evaluation mode") as raised:
        loaded["u"](**batch())
    assert raised.value.code == "TG012"


@pytest.fixture(scope="module")
def fixed() -> tg.Accelerated:
    return tg.optimize(spec(seeded(VLM)), "exact", verify=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: batch(3), "'ids' has 3 in dimension 0; the task was captured for 2"),
        (lambda b: {**b, "patches": b["patches"][:1]}, "'patches' has 1 in dimension 0; the task was captured for 2"),
        (
            lambda b: {**b, "patches": b["patches"].double()},
            "'patches' is torch.float64; the task was captured for torch.float32",
        ),
        (
            lambda b: {**b, "patches": b["patches"][0]},
            r"'patches' has the shape \(4, 6\); the task was captured for 3 dimensions",
        ),
        (lambda b: {**b, "ids": b["ids"].tolist()}, "ids"),
        (lambda b: {**b, "labels": None}, "takes the inputs|must be a tensor"),
        (lambda b: {k: x for k, x in b.items() if k != "labels"}, "takes the inputs"),
    ],
)
def test_what_does_not_fit_is_named(change, what: str, fixed: tg.Accelerated) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(tg.TokgraphError, match=what) as raised:
        fixed["u"](**change(batch()))
    assert raised.value.code == "TG007"


@pytest.mark.slow
def test_a_symbol_that_is_a_number_is_a_fixed_size() -> None:
    """The forward makes the number of images that of samples: export calls the size a symbol, whose value is 2."""

    def forward(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        return understanding(model, ids, patches.view(2, -1, patches.shape[-1]), labels)

    open_ = {**OPEN, "patches": {0: "images"}}
    program = tg.capture(spec(seeded(VLM), forward, dynamic=open_))
    (images,) = [d for d in program["u"].dimensions if d.name == "images"]
    assert images.symbol is None or not images.symbol.isdigit()
    acc = tg.apply(program, tg.make_plan(program, "exact"))
    with pytest.raises(tg.TokgraphError) as raised:
        acc["u"](**batch(3))
    assert raised.value.code == "TG007"


def per_item(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor, items: int, weight: float) -> Tensor:
    return cross_entropy(model(ids, patches), labels, reduction="sum") / items * weight


def rounded(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor, items: int, weight: float) -> Tensor:
    """One number decides a branch, so both stay constants."""
    return per_item(model, ids, patches, labels, items if items > 3 else 3, weight)


@pytest.mark.slow
def test_numbers_that_are_only_computed_with_stay_inputs(tmp_path: Path) -> None:
    model = seeded(VLM)
    acc = tg.optimize(spec(model, per_item, inputs={**batch(), "items": 4, "weight": 0.5}), "exact")
    for items, weight in ((4, 0.5), (24, 0.25), (torch.tensor(7), 1.5)):
        b = {**batch(seed=5), "items": items, "weight": weight}
        assert_same(model, lambda b=b: per_item(model, **b), lambda b=b: acc["u"](**b))
    acc.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    torch.testing.assert_close(loaded["u"](**b), acc["u"](**b))


def test_numbers_that_decide_a_branch_are_constants() -> None:
    model = seeded(VLM)
    acc = tg.optimize(spec(model, rounded, inputs={**batch(), "items": 4, "weight": 0.5}), "exact")
    b = {**batch(seed=5), "items": 4, "weight": 0.5}
    assert_same(model, lambda: rounded(model, **b), lambda: acc["u"](**b))
    for changed in ({"items": 2}, {"items": 4.0}, {"weight": 0.25}):
        with pytest.raises(tg.TokgraphError, match="which is in its graph") as raised:
            acc["u"](**{**b, **changed})
        assert raised.value.code == "TG007"
