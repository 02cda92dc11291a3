"""Policies: each turns facts and options into a plan."""

from .base import Policy, option, policies, policy
from .exact import Exact
from .none import NoDrop
from .published import Dart, FastV, HiMix, HMGen, PyramidDrop, RandomLTD, ShareAll, SharePartial, TaskSpecific
from .shared import Shared

__all__ = [
    "Dart",
    "Exact",
    "FastV",
    "HMGen",
    "HiMix",
    "NoDrop",
    "Policy",
    "PyramidDrop",
    "RandomLTD",
    "ShareAll",
    "SharePartial",
    "Shared",
    "TaskSpecific",
    "option",
    "policies",
    "policy",
]
