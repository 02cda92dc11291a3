"""The readable form of graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.passes.tools import TASKS, captured, listing, node, site
from tokgraph.ir.printer import format_graph


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 8)


def small(model: Small, ids: Tensor) -> Tensor:
    logits = model.layer(model.table(ids))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(scope="module")
def graph() -> tg.TaskGraph:
    task = tg.Task(
        small,
        {"ids": torch.randint(0, 8, (2, 5))},
        dynamic={"ids": {0: "batch", 1: "tokens"}},
        visual=tg.VisualTokens.positions(slice(0, 2)),
    )
    return tg.capture(tg.ModelSpec(Small(), {"small": task}))["small"]


def test_a_small_graph(graph: tg.TaskGraph) -> None:
    """Parameters by name, sizes in the user's words, the module of every call, open ends as such."""
    assert_expected_inline(
        listing(graph),
        """\
%ids = input  # int64[batch, tokens]
%sym_size_int = sym_size.int(%ids, 0)  # batch
%sym_size_int.2 = sym_size.int(%ids, 1)  # tokens
%embedding = embedding(@table.weight, %ids)  # float32[batch, tokens, 4] table
%linear = linear(%embedding, @layer.weight, @layer.bias)  # float32[batch, tokens, 8] layer
%slice = slice.Tensor(%linear, 1, 0, -1)  # float32[batch, tokens - 1, 8]
%add = -1 + %sym_size_int.2  # tokens - 1
%mul = %sym_size_int * %add  # batch*(tokens - 1)
%clone = clone(%slice, memory_format=torch.contiguous_format)  # float32[batch, tokens - 1, 8]
%_unsafe_view = reshape(%clone, [%mul, 8])  # float32[batch*(tokens - 1), 8]
%slice.2 = slice.Tensor(%ids, 1, 1, end)  # int64[batch, tokens - 1]
%clone.2 = clone(%slice.2, memory_format=torch.contiguous_format)  # int64[batch, tokens - 1]
%_unsafe_view.2 = reshape(%clone.2, [%mul])  # int64[batch*(tokens - 1)]
%cross_entropy_loss = cross_entropy_loss(%_unsafe_view, %_unsafe_view.2)  # float32[]
return [%cross_entropy_loss]
""",
    )


def test_every_node_is_there_once(graph: tg.TaskGraph) -> None:
    lines = format_graph(graph).splitlines()
    assert lines[0] == "task small"
    names = [line.split(" = ")[0].strip() for line in lines[1:-1]]
    assert names == [f"%{n.name}" for n in graph.graph.nodes if n.op in ("placeholder", "call_function")]
    assert lines[-1].startswith("  return [%")


@pytest.mark.parametrize("task", TASKS)
def test_who_made_a_node_is_said(task: str) -> None:
    text = format_graph(captured(task).rewritten(site(0, 1), exact=True))
    (restore,) = [line for line in text.splitlines() if " = restore(" in line]
    assert restore.endswith("layers.0 by seed-sites")
    assert "drop(" in text
    assert "tokgraph." not in text
    assert "aten." not in text


def test_sizes_without_a_name_stay_symbols(graph: tg.TaskGraph) -> None:
    text = format_graph(replace(graph, dimensions=()))
    assert "batch" not in text
    size = node(graph, "ids").meta["val"].shape[0]
    assert f"int64[{size}, " in text


def test_formatting_is_repeatable(graph: tg.TaskGraph) -> None:
    assert format_graph(graph) == format_graph(graph.copy())
