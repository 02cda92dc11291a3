"""Policies: each turns facts and options into a plan."""

from .options import Blocks, Depth, L
from .policy import Policy, policies, policy
from .published import Dart, FastV, HiMix, HMGen, PyramidDrop, RandomLTD, ShareAll, SharePartial, TaskSpecific
from .schedule import Phase, Schedule
from .selectors import register_selector
from .shared import Shared
from .undropped import Exact, NoDrop

__all__ = [
    "Blocks",
    "Dart",
    "Depth",
    "Exact",
    "FastV",
    "HMGen",
    "HiMix",
    "L",
    "NoDrop",
    "Phase",
    "Policy",
    "PyramidDrop",
    "RandomLTD",
    "Schedule",
    "ShareAll",
    "SharePartial",
    "Shared",
    "TaskSpecific",
    "policies",
    "policy",
    "register_selector",
]
