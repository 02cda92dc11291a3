"""Verification: rewritten graphs against an oracle that never drops a row, keep-all against captured graphs, and these
against the user's forwards; and compiled graphs against the same graphs run operator by operator.
"""

from .compiled import verify_compiled
from .judge import verify

__all__ = ["verify", "verify_compiled"]
