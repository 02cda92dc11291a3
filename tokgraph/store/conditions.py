"""The conditions of a saved graph as JSON: what it takes for granted of a call, but for the code of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from tokgraph.ir.conditions import Conditions, ConstantInput, Guard, Input, NumberInput, TensorInput

_KINDS: dict[str, type] = {"int": int, "float": float}


def conditions_to_json(conditions: Conditions) -> dict[str, Any]:
    """The conditions as plain data.

    Of modes, that of the model stays, where a module's was read; settings of modules are in the graph for good.
    """
    return {
        "inputs": [_input_to_json(found) for found in conditions.inputs],
        "guards": [asdict(guard) for guard in conditions.guards],
        "reads_mode": bool(conditions.modes),
    }


def _input_to_json(found: Input) -> dict[str, Any]:
    if isinstance(found, TensorInput):
        return {"dtype": str(found.dtype).removeprefix("torch."), "shape": list(found.shape)}
    return {"number": found.kind.__name__} if isinstance(found, NumberInput) else {"constant": found.value}


def conditions_from_json(data: Mapping[str, Any], training: bool) -> Conditions:
    """The inverse.

    Args:
        data: what :func:`conditions_to_json` gave.
        training: the mode that the program was saved in.
    """
    return Conditions(
        tuple(_input_from_json(found) for found in data["inputs"]),
        tuple(Guard(**guard) for guard in data["guards"]),
        {"": training} if data["reads_mode"] else {},
    )


def _input_from_json(data: Mapping[str, Any]) -> Input:
    if "dtype" in data:
        return TensorInput(getattr(torch, data["dtype"]), tuple(data["shape"]))
    return NumberInput(_KINDS[data["number"]]) if "number" in data else ConstantInput(data["constant"])
