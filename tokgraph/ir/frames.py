"""Where in a model's code something happened: frames of tracebacks, without those of torch, of Python and our own."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import fx, nn

from tokgraph.errors import Where

_LISTED = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_MACHINERY = ("torch", "torchgen", "functorch", "sympy", "mpmath", "numpy", "networkx")
"""Packages that run models, or help to; all other packages may hold the code of one."""
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
Place = tuple[str, int]


@cache
def is_machinery(file: str) -> bool:
    """Whether a file is no code of a model: torch's, Python's, tokgraph's, or made up at run time."""
    if file.startswith("<"):
        return not file.startswith(("<stdin>", "<ipython"))
    if _INSTALLED.search(file):
        return Path(_INSTALLED.split(file)[-1]).parts[0] in _MACHINERY
    return any(Path(file).is_relative_to(folder) for folder in _folders())


@cache
def _folders() -> tuple[str, ...]:
    """Folders of Python, of torch where it is not installed, and of tokgraph's packages, which need not lie together."""
    own = [
        path for name in ("", ".passes", ".cli") for path in getattr(sys.modules.get(f"tokgraph{name}"), "__path__", ())
    ]
    return (sysconfig.get_path("stdlib"), str(Path(torch.__file__).parent), *own)


def is_installed(file: str) -> bool:
    """Whether a file belongs to an installed package: a library's code, not the user's own."""
    return _INSTALLED.search(file) is not None


def places(listing: str) -> list[Place]:
    """``(file, line)`` of the frames in a printed traceback, outermost first."""
    return [(file, int(line)) for file, line in _LISTED.findall(listing)]


def source_of(found: Iterable[Place]) -> Where:
    """The innermost line of a model among frames, outermost first; and the user's line that led there, if it is a library's."""
    models = [(file, line) for file, line in found if not is_machinery(file)]
    if not models:
        return Where()
    own = [place for place in models if not is_installed(place[0])]
    caller = own[-1] if own and own[-1] != models[-1] else None
    return Where(source=_written(models[-1]), caller=_written(caller) if caller is not None else None)


def _written(place: Place) -> str:
    return f"{place[0]}:{place[1]}"


def text_of(source: str | None) -> str:
    """The line of code at ``file:line``, without indentation; empty where it cannot be read."""
    file, _, line = (source or "").rpartition(":")
    return linecache.getline(file, int(line)).strip() if line.isdigit() else ""


def where_raised(error: BaseException, model: nn.Module | None = None) -> Where | None:
    """The place in a model's code at which an error, or what caused it, arose; ``None`` where no frame of it is known.

    Args:
        error: the error.
        model: the model, to name the module whose forward ran.
    """
    for cause in causes(error):
        frames = [(frame, line) for frame, line in traceback.walk_tb(cause.__traceback__)]
        found = source_of((frame.f_code.co_filename, line) for frame, line in frames)
        if found.source is not None:
            return replace(found, module=_module_of([frame for frame, _ in frames], model))
        nodes = [n for frame, _ in frames if isinstance(n := frame.f_locals.get("n"), fx.Node)]
        for node in reversed(nodes):  # of a graph that torch interpreted
            found = source_of(places(node.meta.get("stack_trace") or ""))
            if found.source is not None:
                return found
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """What caused an error, the innermost cause first, and the error itself."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return reversed(chain)


def _module_of(frames: list[FrameType], model: nn.Module | None) -> str | None:
    """The path of the innermost module of the model whose method a frame runs."""
    if model is None:
        return None
    found = [path for path, _ in methods_of(frames, model)]
    return found[-1] or None if found else None


def methods_of(frames: Iterable[FrameType], model: nn.Module) -> Iterator[tuple[str, str]]:
    """``(path of the module, name of its method)`` of frames that run methods of a model's modules.

    torch.export calls modules through proxies, which have the attributes of theirs, and are no other way the same.
    """
    paths = {id(module.__dict__): path for path, module in model.named_modules()}
    for frame in frames:
        x = frame.f_locals.get("self")
        if isinstance(x, nn.Module) and id(x.__dict__) in paths:
            yield paths[id(x.__dict__)], frame.f_code.co_name
