"""The parts of measured gradients are of rows: against the rows of eager modules, in odd layouts too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, assert_same_gradients, gradients
from tests.measurement.gradients import (
    EXACT,
    ODD,
    TASKS,
    Measure,
    Measured,
    disagreements,
    in_full,
    loss_of,
    visual_tokens,
)
from tests.passes import models

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it


class Scale(nn.Module):
    """A factor that is broadcast to all rows by hand."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.expand(*x.shape[:2], -1)


class Odd(models.PreNorm):
    """A layer that moves, merges and broadcasts the axes of its rows in every way we know of."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.tokens_first, self.merged, self.tokens_merged = (nn.Linear(hidden, hidden) for _ in range(3))
        self.scale = Scale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        a = self.tokens_first(h.transpose(0, 1)).transpose(0, 1)
        b = self.merged(h.flatten(0, 1)).unflatten(0, (batch, tokens))
        c = self.tokens_merged(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (tokens, batch)).transpose(0, 1)
        return x + self.scale(self.mlp(h + a + b + c))


class OddDecoder(models.Decoder):
    """Learned positions, and a head that reads merged rows and may be tied to the table of ids."""

    def __init__(self, tied: bool) -> None:
        super().__init__(Odd)
        self.positions = nn.Embedding(models.TOKENS, 4)
        if tied:
            self.head.weight = self.tokens.weight

    def stream(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))

    def logits(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return self.head(self.norm(x).flatten(0, 1))


def odd_loss(model: OddDecoder, ids: Tensor) -> Tensor:
    labels = F.pad(ids.masked_fill(ids == models.IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model.logits(model.stream(ids)), labels.flatten())


def odd_spec(tied: bool = False, dynamic: bool = True, batch: int = 2) -> tg.ModelSpec:
    torch.manual_seed(0)
    ids = models.image_ids(batch)
    task = tg.Task(
        odd_loss,
        {"ids": ids},
        dynamic={"ids": {0: "batch"}} if dynamic else None,
        visual=tg.VisualTokens.ids(input="ids", equal=models.IMAGE_ID),
        reads="text",
    )
    return tg.ModelSpec(OddDecoder(tied).double(), {"t": task})


def eager_parts(
    spec: tg.ModelSpec, task: str, mask_of: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Visual and text parts of every parameter of a leaf module: each module runs on two copies of its parameters.

    Args:
        mask_of: name of the module and its output -> the visual rows, broadcasting against the output.
    """
    model = spec.model
    copies = [
        {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters(remove_duplicate=False)}
        for _ in range(2)
    ]
    busy = False

    def twice(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            nonlocal busy
            if busy:
                return None
            busy = True
            own = [{n: side[f"{name}.{n}"] for n, _ in module.named_parameters()} for side in copies]
            visual, text = (functional_call(module, parameters, args) for parameters in own)
            busy = False
            return torch.where(mask_of(name, out), visual, text)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children()) and list(m.parameters())]
    hooks = [module.register_forward_hook(twice(name)) for name, module in leaves]
    loss = loss_of(spec, task)
    for hook in hooks:
        hook.remove()
    names = [f"{n}.{p}" for n, m in leaves for p, _ in m.named_parameters()]
    visual, text = (gradients_of(loss, {n: side[n] for n in names}) for side in copies)
    return visual, text


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["tiny", *ODD])
def test_the_parts_of_every_module(measured: Measure, name: str, task: str) -> None:
    """Norms, tables and a convolution over tokens as well, of the tiny model."""
    spec, split = measured(name).captured.spec, measured(name).splits[task]
    tokens = visual_tokens(spec, task)

    def mask_of(module: str, out: Tensor) -> Tensor:
        if module in ("patches", "codes", "embed"):
            return torch.tensor(module != "embed")
        if isinstance(spec.model.get_submodule(module), nn.Conv1d):
            return tokens.unsqueeze(1)
        rows = tokens if module != "code_head" else tokens[:, tiny.TEXT - 1 : -1]
        return rows.unsqueeze(-1)

    visual, text = eager_parts(spec, task, mask_of)
    assert visual.keys() | text.keys() == split.visual.keys()
    for part, expected in ((split.visual, visual), (split.text, text)):
        assert_same_gradients({n: part[n] for n in expected}, expected, EXACT)


@pytest.mark.parametrize(("dynamic", "batch"), [(True, 2), (False, 2), (False, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_followed_through_odd_layouts(tied: bool, dynamic: bool, batch: int) -> None:
    spec = odd_spec(tied, dynamic, batch)
    captured = Captured.of(spec)
    split = Measured.of(captured).splits["t"]
    tokens = spec.tasks["t"].inputs["ids"] == models.IMAGE_ID

    def mask_of(module: str, out: Tensor) -> Tensor:
        if module == "positions":  # rows of no particular sample: looked at below
            return torch.tensor(False)
        if module.endswith("tokens_first"):
            return tokens.T.unsqueeze(-1)
        if module.endswith("tokens_merged"):
            return tokens.T.reshape(-1, 1)
        return tokens.reshape(-1, 1) if module.endswith((".merged", "head")) else tokens.unsqueeze(-1)

    visual, text = eager_parts(spec, "t", mask_of)
    if tied:
        for part in (visual, text):
            part["tokens.weight"] = part["tokens.weight"] + part.pop("head.weight")
    names = visual.keys() - {"positions.weight"}
    assert {f"stages.stage_1.0.{n}.weight" for n in ("merged", "scale", "norm1")} < names
    for part, expected in ((split.visual, visual), (split.text, text)):
        full = in_full(part, spec.model)
        assert_same_gradients({n: full[n] for n in names}, {n: expected[n] for n in names}, EXACT)
    assert_same_gradients(in_full(split.whole(), spec.model), gradients(spec.model, loss_of(spec, "t")), EXACT)
    assert_same_gradients({"": split.visual["positions.weight"]}, {"": visual_part_of_positions(spec, tokens)}, EXACT)

    assert {share for n, share in captured.facts["t"].profile.items() if "stage_0" in n or n == "positions.weight"} == {
        1
    }
    assert not disagreements(captured, "t", split)


def visual_part_of_positions(spec: tg.ModelSpec, tokens: Tensor) -> Tensor:
    """The gradient at the stream's first value, summed over the samples in which a position is visual."""
    ids = spec.tasks["t"].inputs["ids"]
    x = spec.model.stream(ids).detach().requires_grad_()
    labels = F.pad(ids.masked_fill(tokens, -100), (0, 1), value=-100)[:, 1:]
    (back,) = torch.autograd.grad(F.cross_entropy(spec.model.logits(x), labels.flatten()), x)
    return (back * tokens.unsqueeze(-1)).sum(0)


class Boundary(tiny.Unified):
    """An embedding of its own between the text and the image."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.begin = nn.Parameter(torch.rand(1, 1, 16))


def generate_after_boundary(model: Boundary, ids: Tensor, codes: Tensor) -> Tensor:
    begin = model.begin.expand(len(ids), -1, -1)
    x = torch.cat([model.embed(ids), begin, model.codes(codes)], 1)
    logits = model.code_head(model.backbone(x)[:, ids.shape[1] : -1])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_parameter_that_is_a_text_row_itself(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = Boundary().double()
    generation = tiny.build(dynamic=dynamic).tasks["generation"]
    task = replace(generation, forward=generate_after_boundary)
    captured = Captured.of(tg.ModelSpec(model, {"t": task}))
    split = Measured.of(captured).splits["t"]
    assert captured.facts["t"].profile["begin"] == 0
    assert not split.visual["begin"].any()
    assert split.text["begin"].any()
    assert not disagreements(captured, "t", split)
