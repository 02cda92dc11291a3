"""Passes over task graphs: the only place that changes graphs."""

from .pipeline import GraphPass, PassDelta, Pipeline

__all__ = ["GraphPass", "PassDelta", "Pipeline"]
