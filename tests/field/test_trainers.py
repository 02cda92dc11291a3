"""Trainers: checkpointed calls of random plans, steps in the state, and the trainer of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tokgraph as tg
from tests.field.models import PATCHES, VLM, batch, run, seeded, spec, understanding
from tests.harness import captured_tiny

RANDOM = tg.Plan((tg.DropSite("u", 0, 2, 0.5, "random"),))


@pytest.fixture
def random() -> tg.Accelerated:
    return tg.optimize(spec(seeded(lambda: VLM(3))), RANDOM, verify=False)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recomputed_call_draws_what_it_drew(reentrant: bool, random: tg.Accelerated) -> None:
    """Two micro-batches in flight, each recomputed in the backward pass."""
    task, model, batches = random["u"], random.model, [batch(seed=s) for s in (1, 2)]
    loose = torch.zeros((), requires_grad=True)  # a reentrant region needs an input with a gradient

    def plain() -> Tensor:
        task.step = 3
        return sum(task(**b) for b in batches)  # type: ignore[return-value]

    def checkpointed() -> Tensor:
        task.step = 3
        each = [checkpoint(lambda _, b=b: task(**b), loose, use_reentrant=reentrant) for b in batches]
        return sum(each)  # type: ignore[return-value]

    loss, gradients, _ = run(model, plain)
    assert task.step == 5
    other_loss, others, _ = run(model, checkpointed)
    assert task.step == 5
    assert torch.equal(loss, other_loss)
    for name, g in gradients.items():
        assert g is None or torch.equal(g, others[name]), name


def test_a_call_that_cannot_be_recognised_is_refused(random: tg.Accelerated) -> None:
    task, b = random["u"], batch(seed=1)
    loss = checkpoint(lambda: task(**b), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(tg.TokgraphError, match="preserve_rng_state"):
        loss.backward()


@pytest.mark.slow
def test_steps_resume(random: tg.Accelerated) -> None:
    for _ in range(3):
        random["u"](**batch())
    state = random.state_dict()
    assert int(state["tokgraph_step.u"]) == 3
    other = tg.optimize(spec(seeded(lambda: VLM(3))), RANDOM, verify=False)
    other.load_state_dict(state)
    assert other["u"].step == 3
    other.load_state_dict(random.model.state_dict())  # of the model alone: the step stays
    assert other["u"].step == 3
    assert torch.equal(other["u"](**batch(seed=1)), random["u"](**batch(seed=1)))


def test_plans_that_do_not_draw_add_no_step() -> None:
    acc = tg.optimize(spec(seeded(VLM)), "exact", verify=False)
    assert acc.state_dict().keys() == acc.model.state_dict().keys()


def test_all_tasks_in_a_step() -> None:
    """Each input is the batch of a task; the loss is the sum."""
    captured = captured_tiny(3)
    acc = captured.apply(tg.make_plan(captured.program, "shared", facts=captured.facts))
    module = acc.trainable()
    batches = {name: task.task_graph.example() for name, task in acc.items()}
    losses = {name: acc[name](**x)[0] for name, x in batches.items()}
    assert torch.equal(module(**batches)["loss"], sum(losses.values()))
    assert torch.equal(module(generation=batches["generation"])["loss"], losses["generation"])
    assert module.state_dict().keys() == captured.model.state_dict().keys()
    for wrong, named in (
        ({}, "the batch of a task"),
        ({"drawing": {}}, "'drawing'"),
        ({"generation": {}}, "takes the"),
    ):
        with pytest.raises(tg.BatchError, match=named):
            module(**wrong)
    with pytest.raises(tg.BatchError, match="'drawing'"):
        acc.trainable("drawing")


ROWS = [{k: x[0] for k, x in batch(1, seed=s).items()} for s in range(8)]


def trainer(acc: tg.Accelerated, folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the trainer of transformers needs it")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-2,
        lr_scheduler_type="constant", max_grad_norm=0, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(model=acc.trainable("u"), args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("policy", "options"),
    [("exact", {}), (RANDOM, {"bf16": True}), (RANDOM, {"gradient_checkpointing": True})],
    ids=["plain", "bf16", "checkpointing"],
)
def test_the_trainer_of_transformers(
    options: dict[str, Any], policy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Accumulation, evaluation, a checkpoint after each step, and training resumed from the first of them."""

    def program() -> tg.Accelerated:
        return tg.optimize(spec(seeded(lambda: VLM(3, dropout=0.1))), policy, verify=False)

    acc = program()
    before = acc.model.head.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        trainer(acc, tmp_path, **options).train()
    assert not torch.equal(before, acc.model.head.weight)
    assert ("keeps its activations" in caplog.text) == ("gradient_checkpointing" in options)
    again = program()
    trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, x in acc.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], x, msg=lambda m, n=name: f"{n}: {m}")
    fresh = seeded(lambda: VLM(3))
    fresh.load_state_dict(acc.weights())  # the keys are the model's


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_steps_as_it_does_on_the_model(tmp_path: Path) -> None:
    """With policy ``none`` two steps move every weight as those of the plain model do."""
    accelerated = tg.optimize(spec(seeded(VLM)), "none", verify=False)
    trainer(accelerated, tmp_path / "a").train()
    plain = tg.optimize(spec(seeded(VLM)), "none", verify=False)
    model = plain.trainable("u")
    model.forward = lambda **inputs: {"loss": understanding(plain.model, **inputs)}  # type: ignore[method-assign]
    run_ = trainer(plain, tmp_path / "b")
    run_.model = run_.model_wrapped = model
    run_.train()
    for (name, x), y in zip(accelerated.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert PATCHES == 4
