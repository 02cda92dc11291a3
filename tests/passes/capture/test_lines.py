"""Nodes know the line of the model's code that made them, whatever the name of its function."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from tokgraph.ir.frames import is_machinery, places
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


def line_of(model: type[nn.Module], mark: str) -> str:
    lines, first = inspect.getsourcelines(model)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if mark in line)}"


def test_lines_of_any_method_are_recorded() -> None:
    here = line_of(Model, "# here")
    with whole_traces(below=__file__):
        assert source_line(product(Model())) == here
    assert source_line(product(Model())) == line_of(Model, "self.through_layers(x)")  # as PyTorch does it


def test_who_calls_the_model_is_no_line_of_it() -> None:
    with whole_traces(below=__file__):
        frames = places(product(Model()).meta["stack_trace"])
    assert [file for file, _ in frames if not is_machinery(file)] == [__file__] * 2  # its two methods, and no test


class Calling(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_code_without_a_file_has_lines() -> None:
    names = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x * 2\n", names)
    model = Calling(names["Made"]())
    with whole_traces(below=__file__):
        assert 'File "<string>", line 3, in forward' in product(model).meta["stack_trace"]
