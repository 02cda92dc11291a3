"""A graph's file, looked at before PyTorch reads it: reading ``.pt2`` files runs code that they may hold."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._sympy import functions as sympy_functions

from tokgraph.errors import FileError
from tokgraph.files import parse_json

from .expressions import arithmetic, structure

_MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder|\.data/\w+"
)
"""What `torch.export.save` writes for a graph of ATen operators and tensors: no pickles, no objects, no compiled code."""
_LARGEST_GRAPH = 256 * 2**20
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|tokgraph|higher_order)\.(?!from_file\b|_?print\b)"
    r"([A-Za-z]\w*|_[A-Za-z]\w*|__(and|or|xor|lshift|rshift|iand|ior|ixor)__)(\.[A-Za-z]\w*)?"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|abs|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(floor|ceil|trunc|sqrt)|torch\.(sym_\w+|_sym_\w+)"
)
"""Operators without an effect beyond their results; `aten.from_file` maps any file of the machine."""
_FUNCTIONS = frozenset(sympy_functions.__all__) | frozenset(
    "Symbol Integer Float Rational Add Mul Pow Max Min Abs Eq Ne Equality Unequality Le Lt Ge Gt LessThan GreaterThan "
    "StrictLessThan StrictGreaterThan And Or Not Piecewise ExprCondPair".split()
)


def read_graph(path: Path) -> ExportedProgram:
    """The exported program in a file.

    Raises:
        FileError: it is none that tokgraph wrote, or holds what reading or running it would execute: pickled objects, code
            in place of sizes, functions that are no operators.
    """
    try:
        _check_archive(path)
        return torch.export.load(path)
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path} holds no graph that can be read: {text}", help="save the program again") from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise ValueError("two of its members have one name")
        sizes = {}
        for member in members:
            _, _, name = member.filename.partition("/")
            if not _MEMBERS.fullmatch(name) or member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"it holds {member.filename!r}, which no graph's file does")
            sizes[name] = member.file_size
            if name == "data/sample_inputs/model.pt" and member.file_size:
                raise ValueError("it holds pickled inputs")
        if sum(sizes.values()) > path.stat().st_size or sizes["models/model.json"] > _LARGEST_GRAPH:
            raise ValueError("it claims to hold more than it can")
        texts = {member.filename.partition("/")[2]: member for member in members if member.filename.endswith(".json")}
        for kind in ("weights", "constants"):
            _check_tensors(
                parse_json(_text(archive, texts[f"data/{kind}/model_{kind}_config.json"])), f"data/{kind}", sizes
            )
        _check_graph(parse_json(_text(archive, texts["models/model.json"])))


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    return archive.read(member).decode("utf-8")


def _check_tensors(described: Any, folder: str, sizes: dict[str, int]) -> None:
    """That every tensor is plain bytes in the file, and as large as it claims to be."""
    for name, entry in described["config"].items():
        about = entry["tensor_meta"]
        held = sizes.get(f"{folder}/{entry['path_name']}")
        if entry["use_pickle"] or about is None or held is None:
            raise ValueError(f"the tensor {name!r} is an object, not a tensor in the file")
        if math.prod(size["as_int"] for size in about["sizes"]) > held:  # no type takes less than a byte
            raise ValueError(f"the tensor {name!r} claims to be larger than it is")


def _check_graph(graph: Any) -> None:
    """That names of operators are those of operators, sizes are arithmetic, and structures are plain."""
    checks: dict[str, Callable[[str], object]] = {
        "target": _operator,
        "as_operator": _operator,
        "expr_str": lambda text: arithmetic(text, _FUNCTIONS),
        "in_spec": structure,
        "out_spec": structure,
    }
    for key, x in _entries(graph):
        if key in ("as_custom_obj", "as_opaque"):
            raise ValueError(f"it passes an object to an operator ({key})")
        if key in checks and isinstance(x, str) and x:
            checks[key](x)


def _entries(x: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    waiting = [x]
    while waiting:
        x = waiting.pop()
        if isinstance(x, dict):
            yield from x.items()
            waiting += x.values()
        elif isinstance(x, list):
            waiting += x


def _operator(name: str) -> None:
    if not _OPERATORS.fullmatch(name):
        raise ValueError(f"it calls {name[:80]!r}, which is no operator")
