"""Verification: rewritten graphs against an oracle that never drops a row, keep-all against captured graphs, and these
against the user's forwards.
"""

from .judge import verify

__all__ = ["verify"]
