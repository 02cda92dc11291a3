"""Where a program's time goes: by block, phase, kind of work and task, in ONNX Runtime or PyTorch."""

from .collect import profile_exported, profile_programs
from .events import Event, RunProfile
from .trace import write_trace

__all__ = ["Event", "RunProfile", "profile_exported", "profile_programs", "write_trace"]
