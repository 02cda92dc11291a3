"""Programs, weights and batches in files."""

from .batches import load_batches, save_batches
from .loading import load_accelerated
from .saving import save

__all__ = ["load_accelerated", "load_batches", "save", "save_batches"]
