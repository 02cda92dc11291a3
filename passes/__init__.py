"""Passes over task graphs: the only place that changes graphs."""

from .contract import GraphPass, pass_of, registered_passes
from .pipeline import PassDelta, Pipeline

__all__ = ["GraphPass", "PassDelta", "Pipeline", "pass_of", "registered_passes"]
