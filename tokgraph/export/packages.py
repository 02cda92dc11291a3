"""The packages that ONNX needs, and an install without extras lacks."""

from __future__ import annotations

from importlib import import_module

from tokgraph.errors import DependencyError

PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
INSTALL = "pip install 'tokgraph[onnx]'"


def missing(error: ImportError) -> DependencyError:
    """The error that tells which package is missing, and how to get it."""
    package = (error.name or "").partition(".")[0]
    what = (
        f"the package {package} is not installed" if package in PACKAGES else f"a package cannot be imported: {error}"
    )
    return DependencyError(f"ONNX graphs need the extra 'onnx' of tokgraph: {what}", help=INSTALL)


def require_packages(*names: str) -> None:
    """Import packages, all that ONNX needs if none is named, before work begins that would be in vain without them.

    Raises:
        DependencyError: one is not installed.
    """
    for name in names or PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise missing(error) from error
