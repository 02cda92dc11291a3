"""What reads FX graphs and what changes them: rules, analysis, capture, rewriting, accounting, lowering."""

from .contract import GraphPass, pass_of, registered_passes
from .pipeline import PassDelta, Pipeline

__all__ = ["GraphPass", "PassDelta", "Pipeline", "pass_of", "registered_passes"]
