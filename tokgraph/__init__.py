"""tokgraph: a compiler that thins the visual tokens of unified vision-language models while their tasks keep sharing
their parameters.

Model files import this package to describe a model, so what captures and rewrites one is imported when it is first used.
Importing it registers the operators ``torch.ops.tokgraph``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import ops as ops
from .errors import (
    AnalysisError,
    BatchError,
    CaptureError,
    CompileError,
    DependencyError,
    ExportError,
    FileError,
    IllegalRewriteError,
    InternalError,
    LoadError,
    PlanError,
    SpecError,
    StaleError,
    TokgraphError,
    VerificationError,
)
from .ir.spec import ModelSpec, Task, VisualTokens, load
from .version import VERSION

if TYPE_CHECKING:  # each also in _LATER
    from .blockwise import Blockwise
    from .cluster import estimate
    from .ir.cluster import Cluster
    from .ir.compilation import Compilation
    from .ir.cost import TaskCost
    from .ir.facts import Facts, TaskFacts
    from .ir.plan import DropSite, Plan
    from .ir.program import Program, TaskGraph
    from .ir.rates import Rates
    from .ir.verification import Verification
    from .measurement import ImageAttention, Measurements, image_attention, measure, measure_rates
    from .planning import Policy, Schedule, register_selector
    from .report import summarise
    from .runtime import Accelerated
    from .stages import analyze, apply, capture, costs, make_plan, optimize
    from .store import load_accelerated, load_batches, save_batches
    from .task_module import TaskModule
    from .verification import verify, verify_compiled

__version__ = VERSION

__all__ = [
    "Accelerated",
    "AnalysisError",
    "BatchError",
    "Blockwise",
    "CaptureError",
    "Cluster",
    "Compilation",
    "CompileError",
    "DependencyError",
    "DropSite",
    "ExportError",
    "Facts",
    "FileError",
    "IllegalRewriteError",
    "ImageAttention",
    "InternalError",
    "LoadError",
    "Measurements",
    "ModelSpec",
    "Plan",
    "PlanError",
    "Policy",
    "Program",
    "Rates",
    "Schedule",
    "SpecError",
    "StaleError",
    "Task",
    "TaskCost",
    "TaskFacts",
    "TaskGraph",
    "TaskModule",
    "TokgraphError",
    "Verification",
    "VerificationError",
    "VisualTokens",
    "analyze",
    "apply",
    "capture",
    "costs",
    "estimate",
    "image_attention",
    "load",
    "load_accelerated",
    "load_batches",
    "make_plan",
    "measure",
    "measure_rates",
    "optimize",
    "register_selector",
    "save_batches",
    "summarise",
    "verify",
    "verify_compiled",
]

_LATER = {
    "blockwise": ("Blockwise",),
    "cluster": ("estimate",),
    "ir.cluster": ("Cluster",),
    "ir.compilation": ("Compilation",),
    "ir.cost": ("TaskCost",),
    "ir.facts": ("Facts", "TaskFacts"),
    "ir.plan": ("DropSite", "Plan"),
    "ir.program": ("Program", "TaskGraph"),
    "ir.rates": ("Rates",),
    "ir.verification": ("Verification",),
    "measurement": ("ImageAttention", "Measurements", "image_attention", "measure", "measure_rates"),
    "planning": ("Policy", "Schedule", "register_selector"),
    "report": ("summarise",),
    "runtime": ("Accelerated",),
    "task_module": ("TaskModule",),
    "stages": ("analyze", "apply", "capture", "costs", "make_plan", "optimize"),
    "store": ("load_accelerated", "load_batches", "save_batches"),
    "verification": ("verify", "verify_compiled"),
}
"""Module -> names that are imported from it when they are first asked for."""
_MODULES = {name: module for module, names in _LATER.items() for name in names}
_ROOMS = (
    "cli", "comparison", "distributed", "export", "files", "passes", "profile", "trainable",
    *dict.fromkeys(m.split(".")[0] for m in _LATER),
)  # fmt: skip
"""Modules and packages that ``tokgraph.NAME`` imports."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    elif name in _ROOMS:
        found = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
