"""What `import tokgraph` brings, and that a core install lacks nothing that is not ONNX's."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import tokgraph as tg
import tokgraph.cli
import tokgraph.passes

EXTRAS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "google.protobuf", "transformers", "sklearn", "PIL", "scipy")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"  # importing any of them fails


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_modules_import_without_extras() -> None:
    roots = {"tokgraph.": tg, "tokgraph.passes.": tokgraph.passes, "tokgraph.cli.": tokgraph.cli}
    modules = [m.name for prefix, package in roots.items() for m in pkgutil.walk_packages(package.__path__, prefix)]
    names = sorted(name for name in modules if not name.endswith("__main__"))
    assert len(names) > 100
    python(WITHOUT + "".join(f"import {name}\n" for name in names))


def test_importing_brings_nothing_slow() -> None:
    """Seconds are measured by benchmarks/import_time.py; these are what they would go to."""
    slow = (
        "sympy",
        "networkx",
        "pydantic",
        "rich",
        "torch._dynamo",
        "torch._inductor",
        "torch.onnx",
        "torch.distributed.tensor",
    )
    code = f"import torch, sys; before = {{*sys.modules}}; import tokgraph; print(*({{*sys.modules}} - before) & {{*{slow}}})"
    *brought, operator = python(f"{code}; print(torch.ops.tokgraph.restore)").splitlines()
    assert brought == [""]
    assert operator == "tokgraph.restore"  # the operators are registered


def test_every_public_name_is_there() -> None:
    assert set(tg.__all__) < set(dir(tg))
    for name in tg.__all__:
        assert getattr(tg, name).__name__ == name
    later = {name for names in tg._LATER.values() for name in names}
    assert later < set(tg.__all__)
    names: dict[str, object] = {}
    exec("from tokgraph import *", names)
    assert names["optimize"] is tg.optimize


@pytest.mark.slow
def test_rooms_are_attributes() -> None:
    code = "import tokgraph; print(tokgraph.measurement.measure is tokgraph.measure, tokgraph.cli.main.name)"
    assert python(code).split() == ["True", "main"]
    rooms = {m.name for m in pkgutil.iter_modules(tg.__path__)}
    for name in rooms:
        assert getattr(tg, name) is import_module(f"tokgraph.{name}")


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'tokgraph' has no attribute 'optimise'"):
        tg.optimise  # noqa: B018


MISSING = """
from click.testing import CliRunner
from tokgraph.cli import main
result = CliRunner().invoke(main, {arguments!r})
assert result.exit_code == 1, result
print(result.output)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "model.py"],
        ["run", "FOLDER", "--runtime", "onnxruntime"],
        ["profile", "FOLDER"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_onnx_say_so(tmp_path, arguments: list[str]) -> None:
    (tmp_path / "t.forward.onnx").touch()
    tg.save_batches(tmp_path / "example.safetensors", {"t": [{"x": torch.zeros(1)}]})
    found = python(WITHOUT + MISSING.format(arguments=[str(tmp_path) if a == "FOLDER" else a for a in arguments]))
    assert "error[TG010]: ONNX graphs need the extra 'onnx' of tokgraph: the package onnx is not installed" in found
    assert "help: pip install 'tokgraph[onnx]'" in found


@pytest.mark.slow
def test_onnxruntime_alone_may_be_missing() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None\nimport tokgraph as tg, tokgraph.export.packages as p\n"
    code += "try:\n    p.require_packages()\nexcept tg.DependencyError as error:\n    print(error)\n"
    assert "the package onnxruntime is not installed" in python(code)
