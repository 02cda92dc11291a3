"""Compiled graphs against the same graphs run operator by operator: outputs, loss and gradients over several steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tokgraph.calls.variants import Variant
from tokgraph.errors import VerificationError
from tokgraph.ir.compilation import Compilation, CompilationCheck, TaskCompilation
from tokgraph.ir.node import argument, is_write, output_args
from tokgraph.ir.program import TaskGraph, cuda_devices, is_meta, loss_node
from tokgraph.ir.tensors import read
from tokgraph.ir.verification import TOLERANCE
from tokgraph.runtime import Accelerated

from .compare import Difference, Results, badness, compare_gradients, compare_values

_ROUNDING = 1e-2
"""Gradients this much smaller than the largest are compared with that floor: kernels round in other places."""
_EIGHTHS = {
    torch.float64: (torch.int64, 49),
    torch.float32: (torch.int32, 20),
    torch.float16: (torch.int16, 7),
    torch.bfloat16: (torch.int16, 4),
}
"""Type -> the integer of its width, and the third bit of the fraction, which is worth an eighth of the number at most."""


def verify_compiled(accelerated: Accelerated) -> CompilationCheck:
    """Compile every task, and compare steps of each with the graph run operator by operator.

    The first is on the example batch, the second with other values of all parameters on another batch, the third as the
    first: what compiled code, or a CUDA graph, keeps of one call must not be in the next. The model's state stays as it is.

    Raises:
        CompileError: a graph cannot be compiled.
        VerificationError: nothing is compiled, or the model is on the meta device.
    """
    if is_meta(accelerated.model):
        raise VerificationError("the model is on the meta device, so there are no values to compare")
    tasks = {}
    for name, module in accelerated.items():
        if module.compilation is None:
            raise VerificationError("the tasks are not compiled", help="call accelerated.compile() first")
        with torch.inference_mode(False), torch.enable_grad():
            tasks[name] = _verify_task(module.variants.first, module.compilation)
    types = {p.dtype for p in accelerated.parameters() if p.dtype in TOLERANCE}
    return CompilationCheck(tasks, max((TOLERANCE[t] for t in types), default=TOLERANCE[torch.float32]))


def _verify_task(variant: Variant, how: Compilation) -> TaskCompilation:
    graph, compiled = variant.graph, variant.compiled(how)
    example = graph.flatten(graph.example())
    if _draws(graph):  # compiled code draws other random numbers
        return TaskCompilation(_step(variant, how, example)[1], compiled.functions)
    first, seconds = _compared(variant, how, example)
    other = _another(example)
    with _other_values(graph.named_parameters().values()):
        second, _ = _compared(variant, how, other if compiled.fits(other) else example)
    third, _ = _compared(variant, how, example)
    output, gradient = (max(found, key=badness) for found in zip(first, second, third, strict=True))
    return TaskCompilation(seconds, compiled.functions, output.error, gradient.error, output.where, gradient.where)


def _compared(variant: Variant, how: Compilation, leaves: Sequence[Any]) -> tuple[tuple[Difference, Difference], float]:
    """How outputs and gradients of a step differ, and how long the compiled one took."""
    plain, _ = _step(variant, None, leaves)
    mine, seconds = _step(variant, how, leaves)
    return (compare_values(mine, plain, len(plain.outputs)), compare_gradients(mine, plain, _ROUNDING)), seconds


def _another(leaves: Sequence[Any]) -> list[Any]:
    """A batch of the same sizes: samples in another order, where all inputs seem to have them in front; floats halved."""
    sizes = {len(x) for x in leaves if isinstance(x, torch.Tensor) and x.dim()}
    moved = [x.roll(1, 0) if len(sizes) == 1 and isinstance(x, torch.Tensor) and x.dim() else x for x in leaves]
    return [x * 0.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in moved]


@contextmanager
def _other_values(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Parameters by up to an eighth larger or smaller, and to the bit what they were afterwards, without a copy of them."""
    known = {id(p): p.detach() for p in parameters if p.dtype in _EIGHTHS}

    def flip() -> None:
        for p in known.values():
            whole, bit = _EIGHTHS[p.dtype]
            p.view(whole).bitwise_xor_(1 << bit)

    flip()
    try:
        yield
    finally:
        flip()


def _step(variant: Variant, how: Compilation | None, leaves: Sequence[Any]) -> tuple[Results, float]:
    """A forward and backward pass, after which buffers are what they were; and how long it took."""
    graph = variant.graph
    written = {n.args[0].target: read(graph.graph_module, n.args[0]) for n in graph.graph.nodes if _is_buffer_write(n)}
    before = {target: x.clone() for target, x in written.items()}
    parameters = {name: p for name, p in graph.named_parameters().items() if p.requires_grad}
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(cuda_devices(graph.graph_module)):
            torch.manual_seed(0)
            outputs = list(variant.run(leaves, how))
        loss = outputs[output_args(graph.graph).index(loss_node(graph))]
        found: Sequence[torch.Tensor | None] = [None] * len(parameters)  # of a loss that nothing trains
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {
            n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)
        }
        seconds = time.perf_counter() - start
        values = [x.detach() if isinstance(x, torch.Tensor) else x for x in outputs]
        return Results(values, gradients, {str(t): x.detach().clone() for t, x in written.items()}), seconds
    finally:
        for target, x in before.items():
            written[target].copy_(x)


def _is_buffer_write(node: torch.fx.Node) -> bool:
    return is_write(node) and node.args[0].op == "get_attr"  # type: ignore[union-attr]


def _draws(graph: TaskGraph) -> bool:
    """Whether the graph draws random numbers of PyTorch's: attention and dropout may, and often do not."""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and not any(argument(node, name) in (0, 0.0, False) for name in ("dropout_p", "p", "train"))
        for node in graph.graph.nodes
        if node.op == "call_function"
    )
