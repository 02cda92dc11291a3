"""Graphs for ONNX of models whose sizes depend on data, whose gradients cancel out, and whose operators it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field.models import IMAGE, VLM, assert_same, batch, seeded, spec, understanding
from tokgraph.export import check
from tokgraph.export.session import Session

pytest.importorskip("onnx")


@dataclass(frozen=True)
class Features:
    """What a model can make features of: features, ids, patches, and a convolution of volumes."""

    x: Tensor
    ids: Tensor
    patches: Tensor
    volumes: nn.Conv3d


class Counted(VLM):
    """Features beyond the count of image ids are left out."""

    def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
        count: Any = (ids == IMAGE).sum().item()
        torch._check(count >= 0)
        torch._check(count <= 8)
        assert patches is not None
        features = self.projector(self.tower(patches)).flatten(0, 1)[:count]
        return self.embedding(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)


class Repeated(VLM):
    """Positions come as numbers and how often to repeat them."""

    def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
        return super().embed(ids, patches) + self.embedding(
            torch.arange(4).repeat_interleave(torch.tensor([3, 3, 2, 2]))
        )


class Picked(VLM):
    """Patches that are padding are left out before the tower."""

    def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
        assert patches is not None
        features = self.projector(self.tower(patches[patches.abs().sum(-1) > 0]))
        return self.embedding(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)


def unplanned(model: type[VLM], **options: Any) -> tg.Accelerated:
    program = tg.capture(spec(seeded(lambda: model(**options))))
    return tg.apply(program, tg.make_plan(program, "none"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [Repeated, pytest.param(Counted, marks=pytest.mark.slow), pytest.param(Picked, marks=pytest.mark.slow)]
)
def test_sizes_that_depend_on_data_reach_a_file_after_a_file(model: type[VLM], tmp_path: Path) -> None:
    accelerated = unplanned(model, layers=1)
    accelerated.export_onnx(tmp_path / "1", "forward")
    accelerated.export_onnx(tmp_path / "2", "train-step")


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("grad/blocks.0.k.bias", 0.0),
        pytest.param("grad/blocks.0.k.bias", 1e-5, marks=pytest.mark.slow),
        ("grad/blocks.0.k.weight", 1e-5),
    ],
)
def test_a_gradient_that_is_rounding_passes_and_a_wrong_one_does_not(
    name: str, off: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of keys moves all scores of a query alike, which softmax does not see.

    ``off`` is what is added to a gradient, in terms of the largest of all.
    """
    accelerated = unplanned(VLM, layers=1)
    run = Session.run

    def changed(self: Session, feeds: Any) -> dict[str, Tensor]:
        found = run(self, feeds)
        largest = max(float(x.abs().max()) for key, x in found.items() if key.startswith("grad/"))
        assert float(found["grad/blocks.0.k.bias"].abs().max()) < 1e-6 * largest
        return {**found, name: found[name] + off * largest}

    monkeypatch.setattr(check, "NOISE", 0.0)  # and no floor that hides it
    monkeypatch.setattr(Session, "run", changed)
    if not off:
        accelerated.export_onnx(tmp_path / "files", "train-step")
        return
    with pytest.raises(tg.ExportError, match=rf"{name} differs"):
        accelerated.export_onnx(tmp_path / "files", "train-step")


def pooled(pool: Callable[[Tensor], Tensor], axes: int = 2) -> Callable[[Features], Tensor]:
    """The average of what ``pool`` makes of all features, laid out in a square, is added to each."""

    def change(given: Features) -> Tensor:
        square = given.x.transpose(1, 2).reshape(*given.x.shape[::2], *([2] * 2 if axes == 2 else [1, 2, 2]))
        found = pool(square).flatten(2)
        weights = torch.linspace(0.5, 1.5, found.shape[-1])
        return given.x + (found * weights).mean(-1).unsqueeze(1)

    return change


CHANGES: dict[str, Callable[[Features], Tensor]] = {
    "convolution of volumes without bias": lambda given: given.volumes(given.patches[:, None, None]).flatten(2).mT,
    "squeeze of a longer axis": lambda given: given.x.squeeze(1),
    "integers from a float": lambda given: given.x * (1.0 - (given.ids[:, 2:6] == 0).long())[..., None],
    "small integers from a float": lambda given: given.x * (1.5 - (given.ids[:, 2:6] == 0).int())[..., None],
    "average": pooled(lambda x: F.avg_pool2d(x, 2)),
    "average, padded": pooled(lambda x: F.avg_pool2d(x, 2, 1, 1)),
    "average, padding not counted": pooled(lambda x: F.avg_pool2d(x, (2, 1), 1, (1, 0), count_include_pad=False)),
    "average, rounded up": pooled(lambda x: F.avg_pool2d(x, (1, 2), (2, 1), ceil_mode=True)),
    "average, own divisor": pooled(lambda x: F.avg_pool2d(x, 2, 1, 1, divisor_override=3)),
    "average over volumes": pooled(lambda x: F.avg_pool3d(x, (1, 2, 1)), 3),
    "average of a line": lambda given: given.x + F.avg_pool1d(given.x.mT, 2).mean(-1)[:, None],
    "adaptive average": pooled(lambda x: F.adaptive_avg_pool2d(x, (1, 2))),
    "adaptive average of a line": lambda given: given.x + F.adaptive_avg_pool1d(given.x.mT, 3)[..., 1][:, None],
    "smoothed resize": pooled(lambda x: F.interpolate(x, (3, 1), mode="bilinear", antialias=True)),
}
IN_SHORT = ("average",)


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow) for name in CHANGES]
)
def test_operators_without_a_right_converter(change: str, tmp_path: Path) -> None:
    class Changed(VLM):
        def __init__(self) -> None:
            super().__init__(layers=1)
            self.volumes = nn.Conv3d(1, 16, (1, 1, 6), bias=False)

        def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
            assert patches is not None
            x = self.projector(self.tower(patches))
            features = CHANGES[change](Features(x, ids, patches, self.volumes))
            return self.embedding(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)

    unplanned(Changed).export_onnx(tmp_path / "files", ("forward", "train-step"))


@pytest.mark.parametrize("model", [Picked, pytest.param(Counted, marks=pytest.mark.slow)])
def test_sizes_that_depend_on_data_are_reported(model: type[VLM]) -> None:
    vlm = seeded(lambda: model(layers=1))
    accelerated = tg.optimize(spec(vlm), "exact")
    assert accelerated.report["tasks"]["u"]
    second = batch(seed=3)
    assert_same(vlm, lambda: understanding(vlm, **second), lambda: accelerated["u"](**second))
