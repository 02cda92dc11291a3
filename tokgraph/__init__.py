"""tokgraph: a compiler that thins the visual tokens of unified vision-language models while their tasks keep sharing
their parameters.
"""

from .analyze import analyze, costs
from .capture import capture
from .cost import TaskCost
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
from .facts import Facts, TaskFacts
from .loading import load_accelerated
from .measure import ImageAttention, Measurements, image_attention, load_batches, measure, save_batches
from .optimize import optimize
from .plan import DropSite, Plan
from .planning import make_plan
from .policies import Policy
from .program import Program, TaskGraph
from .rewrite import apply
from .runtime import Accelerated, TaskModule
from .selectors import register_selector
from .spec import ModelSpec, Task, VisualTokens, load
from .summary import summarise
from .verdict import Verification
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
