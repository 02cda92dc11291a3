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


def product(model: nn.Module) -> fx.Node:
    exported = torch.export.export(model, (torch.ones(2),), strict=False)
    (node,) = [n for n in exported.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    return node


def test_lines_of_any_method_are_recorded() -> None:
    lines, first = inspect.getsourcelines(Model)
    here = first + next(i for i, line in enumerate(lines) if "# here" in line)
    with whole_traces():
        assert source_line(product(Model())) == f"{__file__}:{here}"
    assert source_line(product(Model())) != f"{__file__}:{here}"  # as PyTorch does it


def test_code_without_a_file_keeps_what_pytorch_records() -> None:
    names = {"nn": nn}
    exec(
        "class Made(nn.Module):\n    def forward(self, x):\n        return x * 2\n", names
    )  # as in a notebook's string
    with whole_traces():
        assert 'File "<string>", line 3, in forward' in product(names["Made"]()).meta["stack_trace"]  # type: ignore[operator]
