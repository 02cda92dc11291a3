"""Sharding by PyTorch's FSDP2 with the settings that programs of several tasks need, and checkpoints of sharded programs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard

from .blockwise import Blockwise
from .errors import FileError
from .files import parse_json, read_text, write_atomically

_MANIFEST = "checkpoint.json"


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
    - captures the tasks for parameters of ``param_dtype``, if the policy has one;
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
    if policy.param_dtype is not None:
        module.prepare(policy.param_dtype)
    for block in module.blocks:
        shard(block, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False), **options)
    shard(module, mesh=mesh, mp_policy=policy, **options)
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)
    return module


def save(folder: str | Path, module: Blockwise, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> None:
    """Write a checkpoint by ``torch.distributed.checkpoint``: the model under the user's keys, what the plan added, the steps.

    Every process calls it, and writes what it holds. The folder appears when all is written: one that was cut short is
    none. It is read by any number of processes, sharded or not.

    Args:
        folder: where to; what is there is replaced.
        module: the program as a module, sharded or not.
        optimizer: of the module's parameters.
        more: of the training loop, as JSON: ``step=100``.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    if _is_first():
        shutil.rmtree(partial, ignore_errors=True)
    _wait()
    with _alone():
        save_state(_state(module, optimizer), checkpoint_id=partial)
    if _is_first():
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        described = {"files": files, "steps": module.steps, "more": more}
        write_atomically(partial / _MANIFEST, json.dumps(described, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    _wait()


def load(folder: str | Path, module: Blockwise, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load what :func:`save` wrote, by as many processes as there are now.

    Args:
        folder: of a checkpoint.
        module: the program as a module, sharded or not.
        optimizer: of the module's parameters; ``None``: that of the checkpoint is left.

    Returns:
        ``more`` of :func:`save`.

    Raises:
        FileError: it is no checkpoint, or not a whole one.
    """
    described = _described(Path(folder))
    state = _state(module, optimizer)
    if optimizer is not None:
        _leave_out(state["optimizer"]["state"], Path(folder))
    with _alone():
        load_state(state, checkpoint_id=Path(folder))
    keyed = module.keyed()
    set_model_state_dict(keyed, state["model"], options=StateDictOptions(strict=True))
    if optimizer is not None:  # not strict: loading was, but for parameters that had no state
        set_optimizer_state_dict(keyed, optimizer, state["optimizer"], options=StateDictOptions(strict=False))
    module.steps = described["steps"]
    found: dict[str, Any] = described["more"]
    return found


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of a folder of checkpoints that was written last, of those that are whole; ``None``: there is none."""
    found = []
    for path in Path(folder).glob("*") if Path(folder).is_dir() else ():
        try:
            _described(path)
        except FileError:
            continue
        found.append(((path / _MANIFEST).stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def _state(module: Blockwise, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    keyed = module.keyed()
    state: dict[str, Any] = {"model": get_model_state_dict(keyed)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(keyed, optimizer)
    return state


def _leave_out(of_parameters: dict[str, Any], folder: Path) -> None:
    """Take out the state of parameters that had none when the checkpoint was saved: no step had changed them yet."""
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, found in list(of_parameters.items()):
        if not any(f"optimizer.state.{name}.{key}" in known for key in found):
            del of_parameters[name]


def _described(folder: Path) -> Mapping[str, Any]:
    """What is said of a checkpoint beside its tensors.

    Raises:
        FileError: it is none, or a file of it is missing or was cut short.
    """
    try:
        described = parse_json(read_text(folder / _MANIFEST))
        files: dict[str, int] = described["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{folder} holds no checkpoint: {type(error).__name__}", help="load one that save wrote"
        ) from None
    for name, size in files.items():
        path = folder / name
        now = path.stat().st_size if path.is_file() else None
        if now != size:
            said = "is missing" if now is None else f"has {now} bytes, and had {size}"
            raise FileError(f"the checkpoint {folder} is not whole: {name} {said}", help="load the one before it")
    return described  # type: ignore[no-any-return]


@contextmanager
def _alone() -> Iterator[None]:
    """PyTorch warns that there are no other processes, which is as good as some."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
