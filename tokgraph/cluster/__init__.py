"""A training run on many GPUs, on paper: memory of each, time, tokens a second, with a plan and without."""

from .estimates import estimate

__all__ = ["estimate"]
