"""Verification: an oracle that never drops a row, and the comparison with it."""

from .compare import compare_gradients, compare_outputs, run_oracle, run_rewritten
from .oracle import Oracle

__all__ = ["Oracle", "compare_gradients", "compare_outputs", "run_oracle", "run_rewritten"]
