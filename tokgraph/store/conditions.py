"""The conditions of a saved graph as data: what it takes for granted of a call, but for the code of the model."""

from __future__ import annotations

import torch

from tokgraph.ir.conditions import Conditions, ConstantInput, Guard, Input, NumberInput, TensorInput

from .manifest import SavedConditions, SavedConstant, SavedGuard, SavedNumber, SavedTensor

_KINDS: dict[str, type] = {"int": int, "float": float}


def saved_conditions(conditions: Conditions) -> SavedConditions:
    """The conditions as plain data.

    Of modes, that of the model stays, where a module's was read; settings of modules are in the graph for good.
    """
    return SavedConditions(
        inputs=tuple(_saved_input(found) for found in conditions.inputs),
        guards=tuple(SavedGuard(relation=guard.relation, source=guard.source) for guard in conditions.guards),
        reads_mode=bool(conditions.modes),
    )


def _saved_input(found: Input) -> SavedTensor | SavedNumber | SavedConstant:
    if isinstance(found, TensorInput):
        return SavedTensor(dtype=str(found.dtype).removeprefix("torch."), shape=tuple(found.shape))
    if isinstance(found, NumberInput):
        return SavedNumber(number="int" if found.kind is int else "float")
    return SavedConstant(constant=found.value)


def loaded_conditions(saved: SavedConditions, training: bool) -> Conditions:
    """The inverse.

    Args:
        saved: what :func:`saved_conditions` gave.
        training: the mode that the program was saved in.
    """
    return Conditions(
        tuple(_loaded_input(found) for found in saved.inputs),
        tuple(Guard(guard.relation, guard.source) for guard in saved.guards),
        {"": training} if saved.reads_mode else {},
    )


def _loaded_input(saved: SavedTensor | SavedNumber | SavedConstant) -> Input:
    if isinstance(saved, SavedTensor):
        return TensorInput(getattr(torch, saved.dtype), tuple(saved.shape))
    return NumberInput(_KINDS[saved.number]) if isinstance(saved, SavedNumber) else ConstantInput(saved.constant)
