"""A model's own run-time checks stay checks under every policy, say what the model says, and hold no rows back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokgraph as tg
from tests import tiny
from tests.passes.tools import calls
from tokgraph.passes.cost.flops import count_flops
from tokgraph.passes.lower.graph import lower_forward

check = torch.ops.tokgraph.check.default
HERE = Path(__file__).name
Batch = dict[str, Tensor]


def spec_of(forward: Callable[..., Any], layers: int = 2, dynamic: bool = False) -> tg.ModelSpec:
    """Understanding of the tiny model with another forward."""
    spec = tiny.build(layers=layers, dynamic=dynamic)
    return tg.ModelSpec(spec.model, {"understanding": replace(spec.tasks["understanding"], forward=forward)})


def optimized(forward: Callable[..., Any], policy: str = "none", **options: Any) -> tg.TaskModule:
    return tg.optimize(spec_of(forward, **options), policy, verify=False)["understanding"]


def example(**changes: Tensor) -> Batch:
    return {**tiny.build(layers=2).tasks["understanding"].inputs, **changes}


def one_image_token_less() -> Batch:
    ids = example()["ids"].clone()
    ids[0, 2] = 12
    return example(ids=ids)


# ------------------------------------------------------------------ what models check, and how


def counts(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """As transformers does: tensors that must be true, a message that tells numbers."""
    features = model.patches(patches).flatten(0, 1)
    count = (ids == tiny.IMAGE_ID).sum()
    torch._check_tensor_all(
        count * features.shape[-1] == features.numel(), lambda: f"{count} tokens, {features.shape[0]} features"
    )
    return tiny.understand(model, ids, patches, labels)


def numbers(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """A number taken out of a tensor: torch.export believes that it equals what it is checked to equal."""
    count = (ids == tiny.IMAGE_ID).sum().item()
    torch._check(count == patches.shape[0] * patches.shape[1], lambda: f"{count} tokens")
    return tiny.understand(model, ids, patches, labels)


def asserts(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    torch._assert((labels >= -100).all(), f"labels from {labels.min()}, mean of patches {patches.mean():.1f}")
    torch._assert_async((ids < tiny.VOCABULARY).all(), "an id is too large")
    return tiny.understand(model, ids, patches, labels)


def finite(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """The stream after every block."""
    return _on_the_stream(model, lambda x: torch._assert(torch.isfinite(x).all(), "not finite"), ids, patches, labels)


def counted(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """A check of the stream that holds of all its rows, not of some."""
    return _on_the_stream(model, lambda x: torch._assert((x == x).sum() == x.numel(), "rows"), ids, patches, labels)


def finite_logits(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    loss, logits = tiny.understand(model, ids, patches, labels)
    torch._assert(torch.isfinite(logits).all(), "not finite")
    return loss


def _on_the_stream(model: tiny.Unified, checks: Callable[[Tensor], None], *inputs: Tensor) -> Any:
    handles = [layer.register_forward_hook(lambda module, args, x: checks(x)) for layer in model.layers]
    try:
        return tiny.understand(model, *inputs)
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ they hold


@pytest.mark.parametrize("policy", ["exact", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_batch_that_the_model_refuses_is_refused(policy: str) -> None:
    task = optimized(counts, policy, layers=3)
    task(**example())
    with pytest.raises(tg.BatchError) as refused:
        task(**one_image_token_less())
    if policy == "none":  # the others choose rows of the batch, and may find it wrong first
        assert refused.value.message == "a check of the model does not hold for this batch: 11 tokens, 12 features"
        assert HERE in str(refused.value.where and refused.value.where.source)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_number_that_is_checked_is_not_believed(dynamic: bool) -> None:
    task = optimized(numbers, dynamic=dynamic)
    task(**example())
    with pytest.raises(tg.BatchError, match="11 tokens"):
        task(**one_image_token_less())


def test_assertions_on_tensors_are_traced() -> None:
    task = optimized(asserts)
    task(**example())
    labels = example()["labels"].clone()
    labels[0, -1] = -101
    with pytest.raises(tg.BatchError, match=r"labels from -101, mean of patches 0\.\d"):
        task(**example(labels=labels))
    with pytest.raises(tg.BatchError, match="an id is too large"):
        task(**example(ids=example()["ids"] + 20))


def test_a_check_of_the_stream_follows_its_rows() -> None:
    """It costs no policy a row, and is made on those that are left."""
    plain, task = optimized(tiny.understand, "exact"), optimized(finite, "exact")
    assert count_flops(task.task_graph) == count_flops(plain.task_graph)
    rows = [node.args[0].all_input_nodes[0].meta["val"].shape[1] for node in calls(task.task_graph, check)]
    assert rows == [11, 6]
    task(**example())
    with pytest.raises(tg.BatchError, match="not finite") as refused:
        task(**example(patches=example()["patches"] * torch.nan))
    assert refused.value.where is not None
    assert refused.value.where.module == "layers.0"


@pytest.mark.slow
def test_a_check_that_counts_rows_counts_all() -> None:
    task = optimized(counted, "exact")
    task(**example())
    with pytest.raises(tg.BatchError, match="rows"):
        task(**example(patches=example()["patches"] * torch.nan))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hide", "freeze"])
@pytest.mark.parametrize("forward", [finite, counted])
def test_checks_in_a_span(forward: Callable[..., Any], mode: str) -> None:
    found = tg.optimize(spec_of(forward, 4, dynamic=True), "shared", span=(1, 3), mode=mode)
    assert found.verification is not None
    assert found.verification.passed
    found["understanding"](**example())


@pytest.mark.slow
@pytest.mark.parametrize("forward", [finite, finite_logits])
def test_rows_that_are_gone_for_good_are_not_checked(forward: Callable[..., Any]) -> None:
    found = tg.optimize(spec_of(forward, 4), "fastv")
    assert found.verification is not None
    assert found.verification.passed
    with pytest.raises(tg.BatchError):  # of the selector, where it comes first: it cannot rank by NaN
        found["understanding"](**example(patches=example()["patches"] * torch.nan))


@pytest.mark.slow
def test_a_saved_program_checks_and_a_runtime_does_not(tmp_path: Path) -> None:
    made = tg.optimize(spec_of(counts), "exact", verify=False)
    made.save(tmp_path)
    loaded = tg.load_accelerated(tmp_path)["understanding"]
    assert len(calls(loaded.task_graph, check)) == 1
    loaded(**example())
    with pytest.raises(tg.BatchError):
        loaded(**one_image_token_less())
    lowered = lower_forward(made.program["understanding"])
    assert not [n for n in lowered.module.graph.nodes if "tokgraph" in str(n.target)]


def test_tracing_leaves_torch_as_it_was() -> None:
    names = ("_check_with", "_check_tensor_all_with", "_assert", "_assert_async")
    before = [getattr(torch, name) for name in names] + [Tensor.item, Tensor.__format__, torch.SymInt.__format__]
    with pytest.raises(tg.CaptureError):
        tg.capture(spec_of(tiny.branching))
    tg.capture(spec_of(asserts))
    after = [getattr(torch, name) for name in names] + [Tensor.item, Tensor.__format__, torch.SymInt.__format__]
    assert before == after
    assert f"{torch.tensor(2.0):.1f}" == "2.0"


def test_the_message_tells_the_numbers_of_the_run() -> None:
    from tokgraph.ops.checks import filled, slot

    message = f"{slot('v', 0, '.2f')} of {slot('s', 1)}"
    assert filled(message, [torch.tensor(0.5)], [3, 4]) == "0.50 of 4"
