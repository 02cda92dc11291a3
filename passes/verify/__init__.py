"""Verification: an oracle that never drops a row, and the comparison with it."""

from .compare import Results, badness, compare_gradients, compare_outputs, missing_rows, run_oracle, run_rewritten
from .oracle import Oracle

__all__ = [
    "Oracle",
    "Results",
    "badness",
    "compare_gradients",
    "compare_outputs",
    "missing_rows",
    "run_oracle",
    "run_rewritten",
]
