"""Sharding of accelerated programs by PyTorch's FSDP2, with the settings that programs of several tasks need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard

from .blockwise import Blockwise


def fully_shard(
    module: Blockwise,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> Blockwise:
    """Shard each block, and what is around the blocks, by ``torch.distributed.fsdp.fully_shard``.

    Beyond calling it bottom-up, this

    - reduces gradients of parameters that this process has none of, for another process may run another task and wait;
    - lets values that blocks give each other keep their types, which the graphs fixed.

    Make the optimizer afterwards, of ``module.parameters()``: they are other objects now, in the user's model as well.

    Args:
        module: the program as a module, its parameters not sharded yet.
        mesh: one dimension: shards; two: copies of shards (HSDP). ``None``: all processes.
        mp_policy: types of parameters in the forward and of gradients that are reduced.
        options: of ``fully_shard``: ``reshard_after_forward``, ``offload_policy``, ``shard_placement_fn``.

    Returns:
        The module, which is now an ``FSDPModule`` as well.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    for block in module.blocks:
        shard(block, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False), **options)
    shard(module, mesh=mesh, mp_policy=policy, **options)
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)
    return module
