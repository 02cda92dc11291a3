"""Policies: each turns facts and options into a plan."""

from .policy import Policy, option, policies, policy
from .published import Dart, FastV, HiMix, HMGen, PyramidDrop, RandomLTD, ShareAll, SharePartial, TaskSpecific
from .selectors import register_selector
from .shared import Shared
from .undropped import Exact, NoDrop

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
    "register_selector",
]
