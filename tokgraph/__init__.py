"""tokgraph: a compiler that thins the visual tokens of unified vision-language models while their tasks keep sharing
their parameters.
"""

from tokgraph.ir.cost import TaskCost
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.plan import DropSite, Plan
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.ir.spec import ModelSpec, Task, VisualTokens, load
from tokgraph.ir.verification import Verification

from .errors import (
    AnalysisError,
    BatchError,
    CaptureError,
    DependencyError,
    ExportError,
    FileError,
    IllegalRewriteError,
    InternalError,
    LoadError,
    PlanError,
    SpecError,
    TokgraphError,
    VerificationError,
)
from .measurement import ImageAttention, Measurements, image_attention, measure
from .planning import Policy, register_selector
from .report import summarise
from .runtime import Accelerated, TaskModule
from .stages import analyze, apply, capture, costs, make_plan, optimize
from .store import load_accelerated, load_batches, save_batches
from .verification import verify
from .version import VERSION

__version__ = VERSION

__all__ = [
    "Accelerated",
    "AnalysisError",
    "BatchError",
    "CaptureError",
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
    "SpecError",
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
    "image_attention",
    "load",
    "load_accelerated",
    "load_batches",
    "make_plan",
    "measure",
    "optimize",
    "register_selector",
    "save_batches",
    "summarise",
    "verify",
]
