"""Every error has a code, a place in the model's code and a cause that is true: of captures, of calls, on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tests.field.test_checks import Batch, example, one_image_token_less, spec_of
from tokgraph.cli import main
from tokgraph.errors import InternalError

# ------------------------------------------------------------------ forwards that cannot be traced


def takes_numbers(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    big = [x for x in ids[0].tolist() if x > 3]  # here
    return tiny.understand(model, ids, patches, labels)[0] * len(big)


def divides(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    return tiny.understand(model, ids, patches, labels)[0] / float((labels > 0).sum())  # here


def asserts_values(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    assert (ids >= 0).all()  # here
    return tiny.understand(model, ids, patches, labels)


def loops(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    while patches.norm() > 1e9:  # here
        patches = patches / 2
    return tiny.understand(model, ids, patches, labels)


def loops_over_what_is_hit(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    loss = tiny.understand(model, ids, patches, labels)[0]
    for row in (labels[0] > 0).nonzero():  # here
        loss = loss + row.sum()
    return loss


def asks_for_any(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    found = tiny.understand(model, ids, patches, labels)[0]
    return found * 2 if (labels >= 0).any() else found  # here


def keeps_labelled_rows(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    logits = model.head(model.backbone(model.embed(ids) + 0 * patches.sum()))
    return torch.nn.functional.cross_entropy(logits[labels > 0], labels[labels > 0])  # here


def leaves_pytorch(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    weight = float(np.asarray(patches.detach()).mean())  # here
    return tiny.understand(model, ids, patches, labels)[0] * weight


def nests(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    nested = torch.nested.nested_tensor([patches[0], patches[1]])  # here
    return tiny.understand(model, ids, torch.nested.to_padded_tensor(nested, 0.0), labels)


def misfits(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    return model.layers[1].mlp(model.head(model.embed(ids))).sum()  # here


@pytest.mark.parametrize(
    ("forward", "cause"),
    [
        (takes_numbers, "takes values of a tensor into Python"),
        (divides, "takes values of a tensor into Python"),
        (asserts_values, "torch._assert(condition, message) stays a check"),
        (loops, "branches on the value of a tensor"),
        (loops_over_what_is_hit, "model.set_experts_implementation"),
        (asks_for_any, "mask.any = lambda: True"),
        (keeps_labelled_rows, "a cross entropy leaves rows out by its ignore_index"),
        (leaves_pytorch, "leaves PyTorch for NumPy"),
        pytest.param(
            nests, "no rule for this operator", marks=pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
        ),
        (misfits, "make it run first"),
    ],
)
def test_a_forward_that_cannot_be_captured(forward: Callable[..., Any], cause: str) -> None:
    with pytest.raises(tg.CaptureError) as refused:
        tg.capture(spec_of(forward))
    error = refused.value
    assert cause in str(error.help)
    assert error.where is not None
    lines, first = inspect.getsourcelines(forward)
    here = next(i for i, line in enumerate(lines) if "# here" in line)
    assert error.where.source == f"{__file__}:{first + here}"
    assert error.where.module == ("layers.1.mlp.0" if forward is misfits else None)


class Hit(nn.Module):
    """Goes on by as many rows as there are."""

    def forward(self, x: Tensor) -> Tensor:
        for row in (x[0, :, 0] > 9).nonzero():
            x = x + row.sum()
        return x


def test_a_grid_that_is_at_hand_elsewhere_is_no_cause() -> None:
    def with_a_grid(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
        image_grid_thw = ids  # noqa: F841
        return tiny.understand(model, ids, patches, labels)

    spec = spec_of(with_a_grid)
    spec.model.layers[0].mlp = Hit()  # type: ignore[index, union-attr]
    with pytest.raises(tg.CaptureError) as refused:
        tg.capture(spec)
    assert "the loop runs as often as values say" in str(refused.value.help)


def test_an_answer_that_is_given_with_a_tensor_is_checked() -> None:
    def answered(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
        mask = labels >= 0
        torch._assert(mask.any(), "no label")
        mask.any = lambda: True  # type: ignore[method-assign, assignment]
        found = tiny.understand(model, ids, patches, labels)[0]
        return found * 2 if mask.any() else found

    spec = spec_of(answered)
    program = tg.optimize(spec, "none", verify=False)["understanding"]
    eager = asks_for_any(spec.model, **example())  # type: ignore[arg-type]
    torch.testing.assert_close(program(**example()), eager)
    with pytest.raises(tg.BatchError, match="no label"):
        program(**example(labels=torch.full_like(example()["labels"], -100)))


# ------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def task() -> tg.TaskModule:
    """The understanding of the tiny model, sizes fixed."""
    return tg.optimize(spec_of(tiny.understand), "exact", verify=False)["understanding"]


def ids_too_large() -> Batch:
    return example(ids=example()["ids"].index_fill(1, torch.tensor([0]), 1000))


def made_in_inference_mode() -> Batch:
    with torch.inference_mode():
        return {name: x.clone() for name, x in example().items()}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (ids_too_large, "does not run on the values of this batch: IndexError"),
        (one_image_token_less, "a sample has more such tokens"),
        (made_in_inference_mode, "torch.inference_mode"),
        (lambda: example(labels=example()["labels"].to("meta")), "input 'labels' is on meta, and the model on cpu"),
        (lambda: example(ids=[example()["ids"]]), "'ids': nested otherwise than in the example batch"),
        (lambda: example(ids=example()["ids"].numpy()), "input 'ids'"),
        (lambda: example(ids=example()["ids"].tolist()), "'ids': nested otherwise"),
        (lambda: example(ids=None), "input 'ids'"),
        (lambda: example(ids=example()["ids"][0]), "input 'ids'"),
        (lambda: example(patches=example()["patches"].double()), "input 'patches'"),
        (lambda: {name: x[:1] for name, x in example().items()}, "input 'ids'"),
        (lambda: {name: x[:0] for name, x in example().items()}, "input 'ids'"),
        (lambda: {"ids": example()["ids"]}, "takes the inputs ids, patches, labels; got ids"),
    ],
)
def test_a_batch_that_does_not_fit(task: tg.TaskModule, batch: Callable[[], Any], said: str) -> None:
    with pytest.raises(tg.BatchError) as refused:
        task(**batch())
    assert said in refused.value.message


@pytest.mark.parametrize(
    "batch",
    [
        lambda: {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in example().items()},
        lambda: example(patches=example()["patches"].requires_grad_()),
        lambda: example(labels=torch.full_like(example()["labels"], -100)),
    ],
)
def test_a_batch_that_is_unusual(task: tg.TaskModule, batch: Callable[[], Batch]) -> None:
    """Not contiguous, with a gradient of its own, without labels: as eager."""
    inputs, again = batch(), batch()
    loss, expected = task(**inputs)[0], tiny.understand(tiny.build(layers=2).model, **again)[0]
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if inputs["patches"].requires_grad:
        loss.backward()
        expected.backward()
        torch.testing.assert_close(inputs["patches"].grad, again["patches"].grad)
        task.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "exact", "shared"])
@pytest.mark.parametrize("size", [0, 1])
def test_few_samples(policy: str, size: int) -> None:
    spec = spec_of(tiny.understand, 3, dynamic=True)
    found = tg.optimize(spec, policy)["understanding"](**{name: x[:size] for name, x in example().items()})[0]
    expected = tiny.understand(spec.model, **{name: x[:size] for name, x in example().items()})[0]
    if policy != "shared" or not size:
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.slow
def test_fewer_tokens_than_are_dropped() -> None:
    task = tg.optimize(spec_of(tiny.understand, dynamic=True), "exact")["understanding"]
    with pytest.raises(tg.BatchError, match="fewer tokens than the plan drops"):
        task(**{name: x[:, :1] if name != "patches" else x for name, x in example().items()})


def test_a_failure_that_the_batch_does_not_explain_is_ours(task: tg.TaskModule, monkeypatch: Any) -> None:
    def broken(*leaves: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(task.task_graph.graph_module, "forward", broken)
    with pytest.raises(InternalError, match="RuntimeError: a bug; please report this"):
        task(**example())


def test_out_of_memory_stays_what_it_is(task: tg.TaskModule, monkeypatch: Any) -> None:
    """Training loops catch it by its type."""

    def full(*leaves: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(task.task_graph.graph_module, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        task(**example())


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize("arguments", [(), ("--debug",)])
def test_an_internal_error_shows_its_traceback_when_asked(
    arguments: tuple[str, ...], tmp_path: Any, monkeypatch: Any
) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tokgraph.stages.capture", broken)
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [*arguments, "optimize", tiny.__file__, "-o", str(out)])
    assert result.exit_code == 1
    assert "RuntimeError: a bug" in result.output
    assert ("Traceback" in result.output) == bool(arguments)
    assert ("please report this" in result.output) != bool(arguments)
    assert not out.exists()
