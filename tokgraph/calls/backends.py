"""Backends of ``torch.compile`` that take row operators apart: kernels fuse them, and their gradients stay theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._functorch import config as differentiation

from tokgraph import ops
from tokgraph.errors import CompileError
from tokgraph.ir.compilation import Compilation

Backend = Callable[..., Any]


def backend_of(how: Compilation) -> Backend:
    """The backend that a compilation names.

    Raises:
        CompileError: PyTorch knows none of that name.
    """
    if not isinstance(how.backend, str):
        return how.backend
    if how.backend == "inductor":
        return partial(_inductor, how.mode)
    if how.backend == "aot_eager":
        return _aot_eager
    try:
        found: Backend = torch._dynamo.lookup_backend(how.backend)
    except torch._dynamo.exc.InvalidBackend as error:
        known = ", ".join(torch.compiler.list_backends())
        raise CompileError(
            f"no backend of torch.compile is named {how.backend!r}", help=f"there are {known}"
        ) from error
    return found


def _fusible() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Operators that kernels fuse; products of experts stay what they are: one call, which computes what a row needs."""
    return ops.decompositions(grouped_products=False)


def _inductor(mode: str, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # the backward pass is compiled here as well: its errors are then those of this call, which says where they are
    with differentiation.patch(force_non_lazy_backward_lowering=True):
        return compile_fx(
            graph_module,
            inputs,
            config_patches=list_mode_options(mode),
            decompositions={**select_decomp_table(), **_fusible()},
        )


def _aot_eager(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Everything but the making of kernels."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    with differentiation.patch(force_non_lazy_backward_lowering=True):
        return aot_autograd(fw_compiler=boxed_nop, decompositions=_fusible())(graph_module, inputs)
