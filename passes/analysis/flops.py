"""FLOPs of a training step, counted by running it on the meta device under ``torch.utils.flop_counter``.

Source: ``FlopCounterMode`` (a multiply-add is two FLOPs; element-wise work is not counted). Attention runs as its MATH
decomposition, because the counter knows no CPU flash kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokgraph.program import TaskGraph

from ..verify.interpret import GraphInterpreter, on_meta
from .evaluate import evaluate, example_leaves
from .stream import loss_node, output_args


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step on the example batch.

    Args:
        forward: of the forward pass.
        backward: of the backward pass, for the parameters that require gradients.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_flops(graph: TaskGraph) -> Flops:
    """Count the FLOPs of one training step of a task graph on its example batch.

    Raises:
        AnalysisError: a shape depends on values that have no storage.
    """
    interpreter = _MetaInterpreter(graph)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = interpreter.run(*example_leaves(graph))
        forward = counter.get_total_flops()
        loss = outputs[output_args(graph.graph).index(loss_node(graph))]
        trained = [x for x in interpreter.attributes.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if trained:
            torch.autograd.grad(loss, trained, allow_unused=True)
        total = counter.get_total_flops()
    return Flops(forward, total - forward)


class _MetaInterpreter(GraphInterpreter):
    """Runs on the meta device; sizes that depend on data (how many images a mask leaves) are those of the example batch."""

    def __init__(self, graph: TaskGraph) -> None:
        super().__init__(graph.graph_module, *on_meta())
        nodes = [n for n in graph.graph.nodes if n.meta.get("unbacked_bindings")]
        self._known = dict(zip(nodes, evaluate(graph, nodes), strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """One node; the value known for it, as far as shapes and gradients go."""
        if n not in self._known:
            return super().run_node(n)
        known = self._known[n]
        if not isinstance(known, torch.Tensor):
            return known
        inputs = [self.env[x] for x in n.all_input_nodes]
        trained = [x.sum() for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return sum(trained, known.to("meta"))  # sums are free, and lead gradients to the inputs
