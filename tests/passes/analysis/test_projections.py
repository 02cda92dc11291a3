"""What a projection's weight is, through casts."""

from __future__ import annotations

import torch
from torch import fx

from tokgraph.passes.analysis.projections import parameter_behind

aten = torch.ops.aten


def test_a_parameter_is_found_behind_casts() -> None:
    """As autocast makes them; what is computed of a parameter is none."""
    graph = fx.Graph()
    weight = graph.get_attr("weight")
    cast = graph.call_function(aten._to_copy.default, (weight,), {"dtype": torch.bfloat16})
    twice = graph.call_function(aten._to_copy.default, (cast,), {"dtype": torch.float32})
    scaled = graph.call_function(aten.mul.Tensor, (cast, 2.0))
    assert parameter_behind(weight) is parameter_behind(cast) is parameter_behind(twice) is weight
    assert parameter_behind(scaled) is parameter_behind(graph.placeholder("x")) is None
