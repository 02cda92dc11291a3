"""The command line: it parses and prints; everything else is in the library."""

from .main import main

__all__ = ["main"]
