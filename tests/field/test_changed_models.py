"""What users do to a model after it was captured: followed, or refused at the call with what changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import tokgraph as tg
from tests.field.models import VLM, VOCABULARY, assert_same, batch, seeded, spec, understanding


class Scaled(VLM):
    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.tau = 1.0
        self.kept = [0.5]
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, ids, patches=None):  # type: ignore[no-untyped-def]
        return super().forward(ids, patches) * self.tau * self.kept[0] + self.shift


@pytest.fixture(scope="module")
def facts() -> tg.Facts:
    return tg.analyze(tg.capture(spec(seeded(Scaled).eval())))


@pytest.fixture
def acc(facts: tg.Facts) -> Iterator[tg.Accelerated]:
    """A program whose model may be changed: it is put together again afterwards."""
    model = facts.program.model
    tables = [table for m in model.modules() for table in (vars(m), m._modules, m._parameters, m._buffers)]
    before, values = [dict(table) for table in tables], copy.deepcopy(model.state_dict())
    tensors = [(x, x.data, x.requires_grad) for x in (*model.parameters(), *model.buffers())]
    yield tg.apply(facts, tg.make_plan(facts, "none"))
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for x, data, trains in tensors:
        x.data = data
        x.requires_grad_(trains)
    model.kept[0] = 0.5
    model.load_state_dict(values)


def follows(acc: tg.Accelerated, seed: int = 3) -> None:
    b = batch(seed=seed)
    assert_same(acc.model, lambda: understanding(acc.model, **b), lambda: acc["u"](**b))


def refused(acc: tg.Accelerated, what: str) -> None:
    with pytest.raises(tg.TokgraphError, match=what) as raised:
        acc["u"](**batch(seed=3))
    assert raised.value.code == "TG012"
    assert "refresh()" in str(raised.value)
    acc.refresh()
    follows(acc)


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() + 0.01 for k, v in model.state_dict().items()}, assign=True)


def tie(model: nn.Module) -> None:
    model.head.weight = model.embedding.weight


def rebind_buffer(model: nn.Module) -> None:
    model.shift = torch.tensor(0.75)


def new_parameter(model: nn.Module) -> None:
    model.blocks[1].up.weight = nn.Parameter(torch.randn_like(model.blocks[1].up.weight))


def load_in_place(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def freeze(model: nn.Module) -> None:
    model.tower.requires_grad_(False)


def to_double_and_back(model: nn.Module) -> None:
    model.double().float()


@pytest.mark.parametrize(
    "change", [load_assigned, tie, rebind_buffer, new_parameter, load_in_place, freeze, to_double_and_back]
)
def test_other_tensors_in_the_same_places_are_followed(
    change: Callable[[nn.Module], None], acc: tg.Accelerated
) -> None:
    change(acc.model)
    follows(acc)
    assert tg.verify(acc).passed


def other_head(model: nn.Module) -> None:
    model.head = nn.Linear(16, VOCABULARY + 4, bias=False)


def wrap_head(model: nn.Module) -> None:
    """As adapters do: another module in the place of one, with that inside."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(16, VOCABULARY, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.down(x)

    model.head = Adapter(model.head)


def other_setting(model: nn.Module) -> None:
    model.tau = 2.0


def setting_in_place(model: nn.Module) -> None:
    model.kept[0] = 0.25


def class_setting(model: nn.Module) -> None:
    model.blocks[0].norm1.eps = 0.5


def hook(model: nn.Module) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, output: output * 2)


def other_forward(model: nn.Module) -> None:
    before = model.forward
    model.forward = lambda ids, patches=None: before(ids, patches) * 3


def same_block_again(model: nn.Module) -> None:
    model.blocks[1] = copy.deepcopy(model.blocks[1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        pytest.param(other_head, "the module head was replaced", marks=pytest.mark.slow),
        (wrap_head, "the module head was replaced"),
        (other_setting, r"tau was 1.0, it is 2.0"),
        (setting_in_place, r"kept was \[0.5\], it is \[0.25\]"),
        pytest.param(class_setting, r"blocks.0.norm1.eps was 1e-05, it is 0.5", marks=pytest.mark.slow),
        (hook, "hooks of blocks.1 were added or removed"),
        (other_forward, "the forward of the model was replaced"),
        pytest.param(same_block_again, "the module blocks.1 was replaced", marks=pytest.mark.slow),
    ],
)
def test_another_model_is_refused_and_refreshed(
    change: Callable[[nn.Module], None], what: str, acc: tg.Accelerated
) -> None:
    change(acc.model)
    refused(acc, what)


def test_weights_untied_after_capture_are_refused() -> None:
    """The graph has one tensor for both names."""
    model = seeded(VLM)
    model.head.weight = model.embedding.weight
    acc = tg.optimize(spec(model), "exact", verify=False)
    follows(acc)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    refused(acc, "head.weight is another tensor")


def test_tied_weights_that_are_replaced_together_are_followed() -> None:
    model = seeded(VLM)
    model.head.weight = model.embedding.weight
    acc = tg.optimize(spec(model), "exact", verify=False)
    model.head.weight = model.embedding.weight = nn.Parameter(model.head.weight.detach() + 0.1)
    follows(acc)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_type_is_followed(dtype: torch.dtype, acc: tg.Accelerated) -> None:
    acc.model.to(dtype)
    b = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(seed=3).items()}
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert_same(acc.model, lambda: understanding(acc.model, **b), lambda: acc["u"](**b), tolerance)


def test_modes_are_switched_both_ways(acc: tg.Accelerated) -> None:
    """By the model, the task or the program; a submodule that is left in evaluation mode keeps its own."""
    model, b = acc.model, batch(seed=3)
    losses = lambda: {acc["u"](**b).item() for _ in range(3)}  # noqa: E731
    assert len(losses()) == 1
    model.train()
    assert len(losses()) == 3
    follows(acc)
    model.blocks[0].eval()
    follows(acc)
    acc["u"].eval()
    assert not model.training
    assert len(losses()) == 1
    acc.train()
    assert model.training
    assert len(losses()) == 3


def test_a_change_that_is_taken_back_needs_nothing(acc: tg.Accelerated) -> None:
    model = acc.model
    model.tau = 2.0
    handle = model.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(tg.TokgraphError):
        acc["u"](**batch())
    model.tau = 1.0
    handle.remove()
    follows(acc)


def test_modules_that_the_task_does_not_use_may_change(acc: tg.Accelerated) -> None:
    acc.model.later = nn.Linear(3, 3)
    acc.model.note = "text"
    follows(acc)


def test_a_refresh_that_fails_changes_nothing(acc: tg.Accelerated) -> None:
    acc.model.head = nn.Linear(5, VOCABULARY)
    program = acc.program
    with pytest.raises(tg.TokgraphError) as raised:
        acc.refresh()
    assert raised.value.code == "TG003"
    assert acc.program is program


def test_the_checks_leave_modules_as_they_are() -> None:
    """``nn.Module`` answers as PyTorch made it once the capture is over, and after one that fails."""
    assert "__getattribute__" not in vars(nn.Module)
    with pytest.raises(tg.TokgraphError):
        tg.capture(spec(seeded(VLM), lambda model, ids, patches, labels: model.nothing))
    assert "__getattribute__" not in vars(nn.Module)
