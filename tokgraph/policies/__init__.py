"""Policies: each turns facts and options into a plan."""

from .base import Policy, policies, policy
from .exact import Exact
from .none import NoDrop
from .shared import Shared

__all__ = ["Exact", "NoDrop", "Policy", "Shared", "policies", "policy"]
