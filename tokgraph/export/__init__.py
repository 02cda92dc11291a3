"""ONNX files of a program: forward, training step and update step of each task, over one weights file, checked."""

from .files import KINDS, GraphKind, file_name
from .onnx import ExportOptions, export_onnx

__all__ = ["KINDS", "ExportOptions", "GraphKind", "export_onnx", "file_name"]
