"""Drops in the user's own model, by hooks and masks: what a plan has to give. Shares no code with tokgraph.

The rows that are dropped leave every layer of a span, and enter the next one, as they entered its first (hooks behind and in
front of layers): what is added behind a layer, outside of its module, belongs to that layer and is taken past as well
(DeepStack), and a loss that reads what leaves a layer reads them unchanged (JanusFlow).
Where they are hidden, no row but their own sees them as keys (the attention's mask, or the scores that a softmax is given).
All in float64: what the model's code casts to float32 stays float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import tokgraph as tg

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
GROUPED = ("grouped_mm", "_grouped_mm")  # products of experts, which PyTorch has for no float64
FLEX = "flex_attention"
"""The name of an attention that has no gradient on a CPU."""
FLOOR = 1e-6  # of the largest gradient: those of key biases are zero but for rounding


@dataclass(frozen=True)
class Drop:
    """What one site drops: the layers `start .. end - 1` without these rows, which take their places again behind them.

    Args:
        start: first layer.
        end: the layer after the span; there is one.
        rows: `[batch, tokens]` bool, true where a row is dropped.
        mode: `"hide"` or `"freeze"`.
    """

    start: int
    end: int
    rows: Tensor
    mode: Literal["hide", "freeze"]


def visual_rows(visual: tg.VisualTokens, inputs: Mapping[str, Any], tokens: int) -> Tensor:
    """Where the visual tokens of a batch are, `[batch, tokens]` bool, by the user's word."""
    if visual.kind == "ids":
        ids = inputs[str(visual.input)]
        low, high = visual.low, visual.high
        assert low is not None
        return (ids >= low) & (ids <= (low if high is None else high))
    if visual.kind == "mask":
        return inputs[str(visual.input)].flatten(1).bool()
    assert visual.span is not None
    batch = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
    found = torch.zeros(batch, tokens, dtype=torch.bool)
    found[:, slice(*visual.span)] = True
    return found


def dropped_evenly(visual: Tensor, keep: float) -> Tensor:
    """The rows that go where evenly spaced ones stay: `floor(keep * n + 0.5)` of the `n` visual rows of each sample."""
    gone = visual.clone()
    for sample, row in enumerate(visual):
        places = row.nonzero().flatten().tolist()
        stay = floor(keep * len(places) + 0.5)
        gone[sample, [places[i * len(places) // stay] for i in range(stay)]] = False
    return gone


class _Wide(TorchFunctionMode):
    """Float64 throughout, and hidden keys left out of attention while a layer of the span runs."""

    def __init__(self) -> None:
        super().__init__()
        self.visible: Tensor | None = None  # [batch, tokens, keys]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if getattr(func, "__name__", "") != "__get__":
            args, kwargs = pytree.tree_map(lambda x: torch.float64 if _is_narrow(x) else x, (args, kwargs))
        if func is torch.full and isinstance((*args, *kwargs.values())[1], float):
            kwargs = {"dtype": torch.float64, **kwargs}  # the smallest number of that type is none of float32
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if getattr(func, "__name__", "") in GROUPED:
            return _grouped(*args, **kwargs)
        if func in SOFTMAX and self.visible is not None:
            scores, seen = args[0], self._over(args[0].shape)
            if seen is not None:
                args = (scores.masked_fill(~seen, -torch.inf), *args[1:])
        found = func(*args, **kwargs)
        return found.double() if isinstance(found, Tensor) and found.dtype in NARROW else found

    def _over(self, shape: Sequence[int]) -> Tensor | None:
        """Who is seen by whom, for scores of this shape; `None` where they are not over the tokens."""
        assert self.visible is not None
        batch, tokens, _ = self.visible.shape
        if len(shape) < 3 or tuple(shape[-2:]) != (tokens, tokens):
            return None
        if shape[0] == batch:
            return self.visible.reshape(batch, *[1] * (len(shape) - 3), tokens, tokens)
        return self.visible.repeat_interleave(shape[0] // batch, 0)  # heads beside the samples

    def _attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        options |= dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False))
        mask = options.pop("attn_mask", None)
        if mask is not None and mask.dtype in NARROW:
            mask = mask.double()  # PyTorch's attention reads it wrongly beside float64
        seen = None if self.visible is None else self._over((*q.shape[:-1], k.shape[-2]))
        if seen is not None:
            if options.pop("is_causal", False):
                seen = seen & torch.ones(seen.shape[-2:], dtype=torch.bool).tril()
            if mask is None or mask.dtype == torch.bool:
                mask = seen if mask is None else mask & seen
            else:
                mask = mask.masked_fill(~seen, -torch.inf)
        found: Tensor = attention(q, k, v, attn_mask=mask, **options)
        return found


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """Rows `offs[i - 1] .. offs[i] - 1` times matrix `i`."""
    ends = offs.tolist()
    return torch.cat([rows[a:b] @ w for a, b, w in zip([0, *ends[:-1]], ends, weights, strict=True)])


def _is_narrow(x: Any) -> bool:
    return isinstance(x, torch.dtype) and x in NARROW


def _state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with: its first tensor."""
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _span(model: nn.Module, layers: Sequence[str], drop: Drop) -> list[nn.Module]:
    """The layers of the span, and items of their list that stand behind one of them and are no layer of the list."""
    found = [layers[i] for i in range(drop.start, drop.end)]
    listed, _, first = layers[drop.start].rpartition(".")
    if first.isdigit() and all(name.rpartition(".")[0] == listed for name in layers):
        after = int(layers[drop.end].rpartition(".")[2]) if drop.end < len(layers) else None
        items = [name for name, _ in model.get_submodule(listed).named_children()]
        found = [f"{listed}.{i}" for i in items[int(first) : after]]
    return [model.get_submodule(name) for name in found]


def run(
    model: nn.Module, task: tg.Task, inputs: Mapping[str, Any], layers: Sequence[str], drops: Sequence[Drop] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every parameter, in float64, with rows dropped as `drops` say.

    Args:
        model: the user's; it stays as it is.
        task: whose forward is run.
        inputs: a batch of it.
        layers: paths of the decoder layers, in order.
        drops: what goes; spans do not overlap.
    """
    model = copy.deepcopy(model).double()
    if any(getattr(getattr(part, "config", None), "_attn_implementation", "") == FLEX for part in model.modules()):
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    inputs = {k: x.double() if isinstance(x, Tensor) and x.dtype in NARROW else x for k, x in inputs.items()}
    wide = _Wide()
    for drop in drops:
        own = torch.eye(drop.rows.shape[1], dtype=torch.bool)
        entered: list[Tensor] = []
        for layer in _span(model, layers, drop):
            _hook(layer, wide, drop, entered, ~drop.rows.unsqueeze(1) | own if drop.mode == "hide" else None)
        behind = model.get_submodule(layers[drop.end])
        behind.register_forward_pre_hook(partial(_put_back, drop, entered), with_kwargs=True)
    with wide:
        torch.manual_seed(0)
        found = task.forward(model, **inputs)
    loss = found if isinstance(found, Tensor) else found["loss"] if isinstance(found, Mapping) else found[0]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, gradients, strict=True)
    }


def _put_back(
    drop: Drop, entered: Sequence[Tensor], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a layer behind the first of a span: the rows that are dropped are as they entered that one."""
    came = _state(args, kwargs)
    new = torch.where(drop.rows.unsqueeze(-1), entered[0], came)
    return tuple(new if x is came else x for x in args), {k: new if x is came else x for k, x in kwargs.items()}


def _hook(layer: nn.Module, wide: _Wide, drop: Drop, entered: list[Tensor], visible: Tensor | None) -> None:
    """Take the dropped rows past a layer of the span; ``entered`` gets the state before the first of them."""

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide.visible = visible
        if entered:
            return _put_back(drop, entered, layer, args, kwargs)
        entered.append(_state(args, kwargs))
        return None

    def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        wide.visible = None
        made = out if isinstance(out, Tensor) else _state(out, {})
        if made.shape != entered[0].shape:
            return out
        new = torch.where(drop.rows.unsqueeze(-1), entered[0], made)
        return new if made is out else type(out)(new if x is made else x for x in out)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, with_kwargs=True)


def distance(
    mine: tuple[Tensor, Mapping[str, Tensor]], eager: tuple[Tensor, Mapping[str, Tensor]]
) -> tuple[float, str]:
    """The largest relative difference of loss and gradients, and where it is.

    A gradient that eager has and the other side lacks counts as zero.
    """
    (loss, gradients), (eager_loss, expected) = mine, eager
    worst = (float((loss - eager_loss).abs() / eager_loss.abs()), "loss")
    least = FLOOR * max((float(g.abs().max()) for g in expected.values()), default=0.0)
    for name, b in expected.items():
        a = gradients.get(name, torch.zeros_like(b))
        error = float((a - b).abs().max() / b.abs().max().clamp(min=least)) if least else float(a.abs().max())
        worst = max(worst, (error, name), key=lambda found: (found[0] != found[0], found[0]))
    return worst
