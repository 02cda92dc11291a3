"""Nodes know the line of the model's code that made them, whatever the name of its function."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from tokgraph.ir.node import source_line
from tokgraph.passes.capture.lines import whole_traces

pytestmark = pytest.mark.skipif(
    not hasattr(TracerBase, "_filter_traceback_frames"),
    reason="this PyTorch lets nobody choose the frames that it records",
)


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.through_layers(x)

    def through_layers(self, x: Tensor) -> Tensor:
        return x * 2  # here


def product() -> fx.Node:
    exported = torch.export.export(Model(), (torch.ones(2),), strict=False)
    (node,) = [n for n in exported.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    return node


def test_lines_of_any_method_are_recorded() -> None:
    lines, first = inspect.getsourcelines(Model)
    here = first + next(i for i, line in enumerate(lines) if "# here" in line)
    with whole_traces():
        assert source_line(product()) == f"{__file__}:{here}"
    assert source_line(product()) != f"{__file__}:{here}"  # as PyTorch does it
