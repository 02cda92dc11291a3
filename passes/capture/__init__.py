"""Capture: a task's forward becomes a functional ATen graph in which batch and token axes stay apart."""

from .export import capture

__all__ = ["capture"]
