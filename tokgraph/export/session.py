"""Sessions of ONNX Runtime: the package that is there, a device that works, tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch.utils.dlpack import from_dlpack

from tokgraph.errors import BatchError, DependencyError, ExportError

from .packages import INSTALL, missing

Device = Literal["cpu", "cuda"]
_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnxruntime() -> ModuleType:
    """The ``onnxruntime`` module.

    Raises:
        DependencyError: it is not installed, or two packages that bring it are.
    """
    installed = [name for name in _PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        raise DependencyError(
            "both onnxruntime and onnxruntime-gpu are installed: they overwrite each other's files, so which one runs is "
            "chance",
            help=f"pip uninstall -y onnxruntime onnxruntime-gpu, then {INSTALL}",
        )
    try:
        import onnxruntime as module
    except ImportError as error:
        raise missing(error) from error
    return module  # type: ignore[no-any-return]


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


class Session:
    """An ONNX model, loaded.

    Args:
        path: the model.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of an operator; 0: as many as the machine has cores.
        profile: prefix of the file that profiling writes, ``None`` for none.

    Raises:
        DependencyError: ONNX Runtime cannot run on the device.
        ExportError: it cannot load or run the model.
    """

    def __init__(self, path: Path, device: Device = "cpu", *, threads: int = 0, profile: Path | None = None) -> None:
        module = onnxruntime()
        options = module.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if device != "cpu" and _PROVIDERS[device] not in module.get_available_providers():
            raise _no_device(device, "this build of ONNX Runtime has no such provider")
        providers: list[Any] = [_PROVIDERS["cpu"]]
        if (
            device != "cpu"
        ):  # its matrix products are as exact as PyTorch's are set to be; by default they would be in TF32
            providers.insert(0, (_PROVIDERS[device], {"use_tf32": int(torch.backends.cuda.matmul.allow_tf32)}))
        try:
            self._session = module.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise _cannot_load(path, error) from error
        if _PROVIDERS[device] not in self._session.get_providers():  # it falls back without an error
            raise _no_device(device, "its provider could not be loaded (no GPU, driver, or CUDA libraries)")
        self._session.disable_fallback()
        self.path = path
        self.inputs = tuple(x.name for x in self._session.get_inputs())
        self.outputs = tuple(x.name for x in self._session.get_outputs())
        self._types = {x.name: x.type for x in self._session.get_inputs()}

    def feeds(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Inputs as ONNX Runtime takes them; what the model does not read is left out.

        Raises:
            BatchError: an input is missing.
        """
        missing = [name for name in self.inputs if name not in tensors]
        if missing:
            raise BatchError(
                f"{self.path.name} needs the input {missing[0]!r}", help=f"its inputs are {', '.join(self.inputs)}"
            )
        return {name: _value(tensors[name]) for name in self.inputs}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Output -> tensor, from :meth:`feeds`.

        Raises:
            ExportError: the model fails on these inputs.
        """
        return dict(zip(self.outputs, map(_tensor, self.execute(feeds)), strict=True))

    def execute(self, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """The outputs as ONNX Runtime gives them."""
        try:
            return self._session.run_with_ort_values(list(self.outputs), feeds)  # type: ignore[no-any-return]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime failed on {self.path.name}: {_first_line(error)}",
                help="the inputs must have the sizes that the graph allows: those of the example batch, where they are fixed",
            ) from error

    def end_profiling(self) -> Path:
        """Stop profiling; the file with the events."""
        return Path(self._session.end_profiling())


def _no_device(device: str, why: str) -> DependencyError:
    return DependencyError(
        f"ONNX Runtime cannot run on {device!r}: {why}", help="use --device cpu, or install onnxruntime-gpu and CUDA"
    )


def _cannot_load(path: Path, error: Exception) -> ExportError:
    text = _first_line(error)
    unsupported = "NOT_IMPLEMENTED" in text
    return ExportError(
        f"ONNX Runtime cannot load {path.name}: {text}",
        help="its provider has no kernel for this type: export the model in float32, or use another device"
        if unsupported
        else None,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _value(x: torch.Tensor) -> Any:
    module = onnxruntime()
    x = x.detach().cpu().contiguous()
    if x.dtype is torch.bfloat16:  # numpy has no such type
        bits = x.view(torch.int16).numpy().view("uint16")
        return module.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return module.OrtValue.ortvalue_from_numpy(x.numpy())


def _tensor(found: Any) -> torch.Tensor:
    if found.data_type() == "tensor(bfloat16)":
        return from_dlpack(found._get_c_value()).clone()  # numpy has no such type
    return torch.from_numpy(found.numpy().copy())
