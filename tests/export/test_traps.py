"""The three ways of exporting a training step that go wrong without an error, and that the check catches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.export.graph_signature import OutputKind, OutputSpec
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokgraph as tg
from tests.harness import captured_tiny
from tokgraph.export import convert
from tokgraph.export import onnx as export_module
from tokgraph.passes.lower import graph as lower_graph
from tokgraph.passes.lower import step as lower_step

pytest.importorskip("onnx")
aten = torch.ops.aten


@pytest.fixture
def accelerated() -> tg.Accelerated:
    return captured_tiny(1).apply(tg.Plan(), "understanding")


def refused(accelerated: tg.Accelerated, folder: Path, message: str) -> None:
    with pytest.raises(tg.ExportError, match=message):
        accelerated.export_onnx(folder / "out", "train-step")
    assert list(folder.iterdir()) == []


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, p: float, causal: bool, **kwargs
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of the CPU's flash attention from what its forward saved (Dao et al., 2205.14135, appendix B.4)."""
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        above = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = torch.where(above, -torch.inf, scores)
    logsumexp = logsumexp if logsumexp.dim() == 3 else logsumexp[..., 0]  # the kernel reads what lies there
    weights = (scores - logsumexp.unsqueeze(-1)).exp()
    of_weights = grad @ v.transpose(-1, -2)
    of_scores = weights * (of_weights - (grad * out).sum(-1, keepdim=True)) * scale
    return of_scores @ k, of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


def test_trap_a_flash_attention_with_core_decompositions(accelerated, tmp_path: Path, monkeypatch) -> None:
    """The decomposed forward returns a log-sum-exp that nobody computed, and the backward reads it."""
    forward = core_aten_decompositions()[aten._scaled_dot_product_flash_attention_for_cpu.default]
    table = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward,
    }
    known = lower_step.runtime_decompositions
    monkeypatch.setattr(lower_step, "runtime_decompositions", lambda: {**known(), **table})
    monkeypatch.setattr(lower_graph, "sdpa_kernel", lambda *_: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    refused(accelerated, tmp_path, "grad/.* differs between ONNX Runtime and PyTorch")


def test_trap_b_the_converters_loss_fakes_its_total_weight(accelerated, tmp_path: Path, monkeypatch) -> None:
    def without_losses(table):
        return {op: function for op, function in table.items() if "nll_loss" not in str(op)}

    ours, theirs = lower_step.runtime_decompositions, export_module.onnx_decompositions
    monkeypatch.setattr(lower_step, "runtime_decompositions", lambda: without_losses(ours()))
    monkeypatch.setattr(export_module, "onnx_decompositions", lambda opset: without_losses(theirs(opset)))
    refused(accelerated, tmp_path, "grad/.* differs between ONNX Runtime and PyTorch")


def test_trap_c_outputs_that_are_no_user_outputs_are_lost(accelerated, tmp_path: Path, monkeypatch) -> None:
    known = convert.exported_program

    def as_a_joint_program(*args, **kwargs):
        program = known(*args, **kwargs)
        loss, *gradients = program.graph_signature.output_specs
        program.graph_signature.output_specs[:] = [
            OutputSpec(OutputKind.LOSS_OUTPUT, loss.arg, None),
            *(OutputSpec(OutputKind.GRADIENT_TO_PARAMETER, spec.arg, "x") for spec in gradients),
        ]
        return program

    monkeypatch.setattr(convert, "exported_program", as_a_joint_program)
    refused(accelerated, tmp_path, "lacks the output")
