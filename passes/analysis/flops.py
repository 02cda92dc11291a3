"""FLOPs of a training step, counted by running it on the meta device under ``torch.utils.flop_counter``.

Source: ``FlopCounterMode`` (a multiply-add is two FLOPs; element-wise work is not counted). Attention runs as its MATH
decomposition, because the counter knows no CPU flash kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokgraph.program import TaskGraph

from ..verify.interpret import GraphInterpreter, on_meta
from .evaluate import example_leaves
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
    """Count the FLOPs of one training step of a task graph on its example batch."""
    interpreter = GraphInterpreter(graph.graph_module, *on_meta())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = interpreter.run(*example_leaves(graph))
        forward = counter.get_total_flops()
        loss = outputs[output_args(graph.graph).index(loss_node(graph))]
        trained = [x for x in interpreter.attributes.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if trained:
            torch.autograd.grad(loss, trained, allow_unused=True)
        total = counter.get_total_flops()
    return Flops(forward, total - forward)
