"""Which operators are known to multiply no matrices, and FLOPs of products that torch's counter does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..rules.registry import entry

aten = torch.ops.aten
Formula = Callable[..., Any]


def _vector_product(left: Sequence[Any], *_: Any, **__: Any) -> Any:
    """``[n, k] @ [k]`` and ``[k] . [k]``: a multiply-add for every element of the left operand."""
    flops: Any = 2
    for size in left:
        flops = flops * size
    return flops


def _added_vector_product(_bias: Sequence[Any], left: Sequence[Any], *_: Any, **__: Any) -> Any:
    return _vector_product(left)


def _summed_products(_bias: Sequence[Any], left: Sequence[Any], right: Sequence[Any], *_: Any, **__: Any) -> Any:
    """``sum over b of [b, n, k] @ [b, k, m]``."""
    return _vector_product(left) * right[-1]


MORE: Mapping[Any, Formula] = MappingProxyType(
    {
        **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_product),
        aten.addmv: _added_vector_product,
        aten.addbmm: _summed_products,
    }
)
"""Operator -> FLOPs from the shapes of its arguments, beside those of ``torch.utils.flop_counter``."""

_NO_PRODUCTS = frozenset(
    {
        # normalisation and losses
        "_safe_softmax", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update", "cudnn_batch_norm", "_weight_norm_interface", "nll_loss2d_forward",
        "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "norm",
        # reductions, running sums and order
        "aminmax", "max", "min", "all", "any", "var", "std", "var_mean", "std_mean", "cummax", "cummin", "median",
        "mode", "nansum", "count_nonzero", "kthvalue", "searchsorted", "bucketize", "unique_consecutive", "_unique2",
        "bincount", "histc", "nonzero", "nonzero_static", "_is_all_true", "_is_any_true", "equal",
        "_local_scalar_dense",
        # making, moving and joining
        "copy", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "repeat_interleave", "tril", "triu",
        "diag_embed", "tril_indices", "triu_indices", "_reshape_copy", "_assert_async", "_assert_scalar",
        "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "resize", "set_",
        "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        # looking up and writing
        "_embedding_bag", "_embedding_bag_forward_only", "_unsafe_index", "take", "masked_select", "masked_scatter_",
        "masked_fill_", "scatter", "scatter_reduce", "_unsafe_index_put", "_index_put_impl_", "index_fill",
        "index_reduce", "diagonal_scatter",
        # pooling and resampling: sums with fixed weights
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
        "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "upsample_nearest1d",
        "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
        "upsample_linear1d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d", "im2col", "col2im", "glu",
    }
)  # fmt: skip
"""Operators of ATen without a rule whose work is of the order of what they read and write."""

_PLAIN_NAMESPACES = frozenset({"prim", "tokgraph"})
"""Namespaces without products; those of tokgraph's operators that make some (scores) register their formulas."""


def multiplies_nothing(operator: Any) -> bool:
    """Whether an operator is known to multiply no matrices.

    Known are operators with a token-axis rule (which says so where they do multiply some), element-wise operators, views,
    operators that make tensors from none, those of a list, and tokgraph's own. What nobody has said anything about is
    not known.
    """
    found = entry(operator)
    return _plain(operator) if found is None else not found.traits.products


@cache
def _plain(operator: Any) -> bool:
    """Whether an operator without a rule is known to multiply no matrices."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in operator.tags or operator.is_view or operator.namespace in _PLAIN_NAMESPACES:
        return True
    if not any("Tensor" in str(argument.type) for argument in operator._schema.arguments):
        return True
    return operator.namespace == "aten" and operator._schema.name.removeprefix("aten::") in _NO_PRODUCTS


class Parts(TorchDispatchMode):
    """Sees what a ``FlopCounterMode`` that is entered after it runs, composite operators taken apart.

    ``unknown`` becomes true when it runs an operator without a formula that may multiply matrices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in MORE and not multiplies_nothing(func):
            self.unknown = True
        return func(*args, **(kwargs or {}))
