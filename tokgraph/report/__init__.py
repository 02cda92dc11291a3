"""What a program costs and shares, before and after a plan, as plain data."""

from .report import make_report
from .summary import summarise, with_nodes

__all__ = ["make_report", "summarise", "with_nodes"]
