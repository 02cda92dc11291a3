"""Sharding by PyTorch's FSDP2 with the settings that programs of several tasks need, and checkpoints of sharded programs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from .checkpoints import (
    MANIFEST,
    Planner,
    Reader,
    check_contents,
    described,
    everywhere,
    is_first,
    told,
    write_manifest,
)
from .errors import FileError


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
    unfinished, before = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "before"))
    try:
        json.dumps(more)
    except (TypeError, ValueError) as error:
        raise FileError(
            f"a checkpoint cannot hold {', '.join(more)}: {error}", help="give what JSON can hold"
        ) from None
    everywhere(partial(_begin, folder, unfinished, before))
    try:
        with (
            _alone(),
            told(f"the checkpoint {folder} cannot be written", "nothing of it is left; others are as they were"),
        ):
            save_state(_state(module, optimizer), checkpoint_id=unfinished)
        write_manifest(unfinished, {"steps": module.steps, "more": more})
    except FileError:
        everywhere(partial(_end, unfinished))
        raise
    everywhere(partial(_replace, folder, unfinished, before))


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
    folder = Path(folder)
    about = described(folder)
    check_contents(folder, about)
    known = _known(folder)
    state = _state(module, optimizer)
    if optimizer is not None:
        _leave_out(state["optimizer"]["state"], known)
    strange = [name for name in known if name.startswith("model.") and not _is_of(state["model"], name)]
    advice = "load it into the model, the plan and the optimizer that it was saved of"
    if strange:
        names = ", ".join(name.removeprefix("model.") for name in strange[:3])
        raise FileError(f"the checkpoint {folder} holds {names}, which the module does not have", help=advice)
    with _alone(), told(f"the checkpoint {folder} cannot be loaded", advice):
        load_state(state, storage_reader=Reader(folder), planner=Planner())
    keyed = module.keyed()
    set_model_state_dict(keyed, state["model"], options=StateDictOptions(strict=True))
    if optimizer is not None:  # not strict: loading was, but for parameters that had no state
        set_optimizer_state_dict(keyed, optimizer, state["optimizer"], options=StateDictOptions(strict=False))
    module.steps = about["steps"]
    found: dict[str, Any] = about["more"]
    return found


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of a folder of checkpoints that was written last, of those that are whole; ``None``: there is none."""
    found = []
    for path in Path(folder).glob("*") if Path(folder).is_dir() else ():
        try:
            described(path)
        except FileError:
            continue
        found.append(((path / MANIFEST).stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def _state(module: Blockwise, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    keyed = module.keyed()
    state: dict[str, Any] = {"model": get_model_state_dict(keyed)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(keyed, optimizer)
    return state


def _known(folder: Path) -> Mapping[str, Any]:
    """Name of what a checkpoint holds -> what it is.

    Raises:
        FileError: its metadata is not that of PyTorch.
    """
    try:
        return Reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle that others wrote fails in any way
        raise FileError(f"{folder / '.metadata'} is not PyTorch's: {error}", help="load one that save wrote") from None


def _is_of(model: Mapping[str, Any], name: str) -> bool:
    """Whether a name of a checkpoint is that of a tensor of a model, or of a part of what a model saves besides."""
    whole = name.removeprefix("model.")
    return whole in model or any(whole.startswith(f"{other}.") for other in model if other.endswith("_extra_state"))


def _leave_out(of_parameters: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Take out the state of parameters that had none when the checkpoint was saved: no step had changed them yet."""
    for name, found in list(of_parameters.items()):
        if not any(f"optimizer.state.{name}.{key}" in known for key in found):
            del of_parameters[name]


@contextmanager
def _alone() -> Iterator[None]:
    """PyTorch warns that there are no other processes, which is as good as some."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _begin(folder: Path, unfinished: Path, before: Path) -> None:
    """Remove what is left of a process that died; put back what it had taken away."""
    if is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
        if before.exists() and not folder.exists():
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)


def _end(unfinished: Path) -> None:
    """Remove what could not be written."""
    if is_first():
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(folder: Path, by: Path, before: Path) -> None:
    """Put a whole checkpoint in the place of another: one of them is there at any time, if under another name."""
    if is_first():
        if folder.exists():
            folder.rename(before)
        by.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
