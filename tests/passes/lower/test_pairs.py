"""Complex numbers as pairs of real ones: the same values and gradients, and no complex value left."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import tokgraph as tg
from tests.harness import gradients
from tests.passes.lower.programs import assert_equal, call
from tokgraph.ir.node import value
from tokgraph.passes.lower import Lowered, lower_train_step, real_valued


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TABLE = torch.view_as_complex(random(3, 4, 2, seed=1))

CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda z, t: z * t,
    "product with real": lambda z, t: z * t.real,
    "product with numbers": lambda z, t: (z * 2.0) * (1 - 2j),
    "real by an imaginary number": lambda z, t: z.real * 1j,
    "quotient": lambda z, t: z / t,
    "quotient by real": lambda z, t: z / t.real / 3.0,
    "sum and difference": lambda z, t: (z + t) - 2 * z.conj() - t.real + 1.0,
    "real and an imaginary number": lambda z, t: z.real + 2j,
    "scaled and added": lambda z, t: torch.add(z, t, alpha=3),
    "broadcast": lambda z, t: z[:1] + t * z[:, :1],
    "exponential": lambda z, t: torch.exp(z * 1j),
    "polar": lambda z, t: torch.polar(t.real.abs(), z.imag) + torch.complex(z.real, t.imag),
    "size and angle": lambda z, t: z.abs() * z.angle() + 0j * t,
    "shapes": lambda z, t: (-z).unsqueeze(-1).expand(3, 4, 5).permute(2, 0, 1).transpose(-1, 0).reshape(-1, 5)[:, :, None],
    "squeezed": lambda z, t: z.unsqueeze(1).squeeze(-2) * t.view(12).view(3, 4),
    "parts": lambda z, t: torch.cat([z[1:, ::2], t[:2, 2:]], -1) * z.select(-1, 1)[:2, None],
    "by index": lambda z, t: torch.stack([z.index_select(1, z.real.argsort(1)[0, :2]), t[:, t.real.argsort(1)[0, :2]]], -2),
    "gathered": lambda z, t: z.gather(1, z.real.argsort(1)) * z.new_zeros(3, 4).scatter(0, t.real.argsort(0), t),
    "summed": lambda z, t: z.sum(-1) * t.sum() + t.sum(0, keepdim=True).sum(-1),
    "chosen": lambda z, t: torch.where(z.real > 0, z, t) + torch.nn.functional.pad(z, (1, 2))[:, 1:-2],
}  # fmt: skip


def traced(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, outputs: tuple[str, ...] = ("out",)) -> Lowered:
    module = make_fx(lambda table, x: (function(x, table),), tracing_mode="fake", _allow_non_fake_inputs=True)(TABLE, x)
    return Lowered("t", "forward", module, {"table": TABLE}, ("x",), outputs)


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str) -> None:
    x, function = random(3, 4, 2), CASES[case]

    def real(x: Tensor, table: Tensor) -> Tensor:
        found = function(torch.view_as_complex(x), table)
        return torch.view_as_real(found) if found.is_complex() else found

    found = real_valued(traced(real, x))
    values = [value(node) for node in found.module.graph.nodes]
    assert not any(isinstance(x, Tensor) and x.is_complex() for x in values)
    torch.testing.assert_close(found.module(*found.state.values(), x)[0], real(x, TABLE), rtol=1e-12, atol=1e-12)


def test_graphs_without_complex_numbers_stay_as_they_are() -> None:
    plain = make_fx(lambda x: (x * 2,))(random(3))
    same = Lowered("t", "forward", plain, {}, ("x",), ("out",))
    assert real_valued(same) is same


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (lambda x, table: torch.fft.fft(x).real, random(4), "_fft_c2c.default|_fft_r2c.default"),
        (lambda x, table: x.real, TABLE, "the input 'x' is complex"),
        (lambda x, table: x * 1j, random(4), "the output 'out' is complex"),
    ],
)
def test_what_has_no_form_in_real_numbers_is_refused(function: Callable, given: Tensor, message: str) -> None:
    with pytest.raises(tg.ExportError, match=message):
        real_valued(traced(function, given))


class Rotary(nn.Module):
    """Rotations as products with complex numbers, some of them kept in a buffer, as in Llama 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.register_buffer(
            "turns", torch.polar(torch.ones(16, 4), torch.arange(64.0).reshape(16, 4)).to(torch.cdouble)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns[: ids.shape[1]]
        angles = torch.arange(ids.shape[1]).unsqueeze(-1) * torch.arange(4.0, dtype=torch.float64)
        turned = turned * torch.polar(torch.ones_like(angles), angles)[None]
        return self.head(torch.view_as_real(turned).flatten(-2)).square().mean()


@cache
def rotary() -> tuple[Rotary, tg.Program]:
    torch.manual_seed(0)
    model, ids = Rotary().double(), torch.arange(10).reshape(2, 5) % 9
    model.turns = torch.polar(torch.ones(16, 4).double(), torch.arange(64.0).double().reshape(16, 4))
    visual, open_sizes = tg.VisualTokens.ids(input="ids", equal=8), {"ids": {0: "batch", 1: "tokens"}}
    task = tg.Task(lambda model, ids: model(ids), {"ids": ids}, dynamic=open_sizes, visual=visual, reads="text")
    return model, tg.capture(tg.ModelSpec(model, {"read": task}))


def test_gradients_of_rotations() -> None:
    model, program = rotary()
    lowered = real_valued(lower_train_step(program["read"]))
    assert "turns.pairs" in lowered.state
    for ids in (torch.arange(10).reshape(2, 5) % 9, torch.arange(21).reshape(3, 7) % 9):
        loss = model(ids)
        found = call(lowered, {"ids": ids})
        torch.testing.assert_close(found.pop("loss"), loss.detach())
        assert_equal(found, {f"grad/{name}": g for name, g in gradients(model, loss).items()})
