"""Files of a saved program that were changed on purpose, hashes and all: refused by name, and no code of theirs runs."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokgraph as tg
from tests.store.programs import Saved, read
from tokgraph.store.archive import read_graph
from tokgraph.store.expressions import arithmetic, structure
from tokgraph.store.manifest import MANIFEST, Fingerprint
from tokgraph.store.weights import stored_tensors

pytestmark = pytest.mark.xdist_group("store")  # one process saves the programs
GRAPH = "understanding.pt2"


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.folder, tmp_path / "changed"))


def seal(folder: Path) -> None:
    """Write the hashes of the files as they are now: whoever changes a file can do that."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: Fingerprint.of(folder / name).model_dump() for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


def refused(folder: Path) -> str:
    seal(folder)
    with pytest.raises(tg.TokgraphError) as raised:
        tg.load_accelerated(folder)
    return str(raised.value)


def change_manifest(folder: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewrite_archive(
    path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Change members of a graph's file, by their names without the first folder."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)


def change_graph(path: Path, change: Callable[[Any], None]) -> None:
    def changed(members: dict[str, bytes]) -> None:
        graph = json.loads(members["models/model.json"])
        change(graph)
        members["models/model.json"] = json.dumps(graph).encode()

    rewrite_archive(path, changed)


def entries(x: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(x, dict):
        for key in x:
            yield x, key
    for item in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from entries(item)


def first(x: Any, key: str) -> dict[str, Any]:
    return next(holder for holder, found in entries(x) if found == key and holder[found])


def test_a_rewritten_archive_is_read(folder: Path) -> None:
    """What the tests below change is all that is changed."""
    rewrite_archive(folder / GRAPH, lambda members: None)
    seal(folder)
    tg.load_accelerated(folder)


@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('PROOF').touch() or True",
        "math.os.system('touch PROOF')",
        "(lambda: True)()",
        "[].__class__",
        "u0_0 ** 9 ** 9 ** 9",
        "9" * 30,
        "1) or (1",
        pytest.param("(" * 5000 + "1" + ")" * 5000, id="nested"),
        pytest.param("+" * 50_000 + "1", id="long"),
        "1 # ",
        "math.factorial(10 ** 9)",
        "",
    ],
)
def test_relations_are_arithmetic(folder: Path, tmp_path: Path, code: str) -> None:
    proof = tmp_path / "proof"

    def change(manifest: Any) -> None:
        manifest["tasks"]["understanding"]["conditions"]["guards"].append(
            {"relation": code.replace("PROOF", str(proof)), "source": None}
        )

    change_manifest(folder, change)
    said = refused(folder)
    assert said.startswith("error[TG011]")
    assert "relation" in said
    assert not proof.exists()


def test_relations_that_programs_have() -> None:
    functions = frozenset({"max", "math.floor"})
    for text in ("x0_1 >= 3", "-3 + x0_1 != max(1, x0_0) * 2", "math.floor(x0_1 / 2) == x0_0 ** 2", "not (x0_1 % 2)"):
        assert arithmetic(text, functions) == text


def in_place_of(key: str, code: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        first(graph, key)[key] = code

    return change


@pytest.mark.parametrize(
    ("key", "code", "says"),
    [
        ("target", "torch.os.system", "which is no operator"),
        ("target", "torch.ops.aten.from_file.default", "which is no operator"),
        ("target", "torch.ops.aten.add.__class__", "which is no operator"),
        ("target", "torch.ops.load_library", "which is no operator"),
        ("target", "_operator.methodcaller", "which is no operator"),
        ("expr_str", "__import__('os').system('touch PROOF')", "no arithmetic"),
        ("expr_str", "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "a power"),
        ("expr_str", "S.One.__class__", "no arithmetic"),
        ("in_spec", '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]', "a structure of type"),
        ("in_spec", '[1, {"type": "builtins.dict", "context": "[{\\"__enum__\\": true}]", "children_spec": []}]', "the keys"),
    ],
)  # fmt: skip
def test_graphs_hold_operators_and_sizes(folder: Path, key: str, code: str, says: str) -> None:
    change_graph(folder / GRAPH, in_place_of(key, code))
    with pytest.raises(tg.FileError, match=says):
        read_graph(folder / GRAPH)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def tensor_entry(path_name: str, sizes: tuple[int, ...], *, use_pickle: bool = False) -> dict[str, Any]:
    meta = {
        "dtype": 7, "sizes": [{"as_int": size} for size in sizes], "requires_grad": False, "layout": 7,
        "device": {"type": "cpu", "index": None}, "strides": [{"as_int": 1} for _ in sizes], "storage_offset": {"as_int": 0},
    }  # fmt: skip
    return {"path_name": path_name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": meta}


@pytest.mark.parametrize("where", ["weights", "constants", "object", "opaque", "legacy", "inputs"])
def test_nothing_is_unpickled(folder: Path, tmp_path: Path, where: str) -> None:
    proof = tmp_path / "proof"
    payload = io.BytesIO()
    torch.save(Touch(proof), payload)

    def change(members: dict[str, bytes]) -> None:
        kind = "weights" if where == "weights" else "constants"
        config = json.loads(members[f"data/{kind}/model_{kind}_config.json"])
        name = {"weights": "weight_0", "object": "custom_obj_0", "opaque": "opaque_obj_0"}.get(where, "tensor_0")
        config["config"]["x"] = tensor_entry(name, (1,), use_pickle=True)
        if where in ("legacy", "inputs"):
            name = "../sample_inputs/model.pt" if where == "inputs" else "model.pt"
        else:
            members[f"data/{kind}/model_{kind}_config.json"] = json.dumps(config).encode()
        members[f"data/{kind}/{name}".replace("constants/../", "")] = (
            pickle.dumps(Touch(proof)) if where in ("opaque", "object") else payload.getvalue()
        )

    rewrite_archive(folder / GRAPH, change)
    assert "holds no graph that can be read" in refused(folder)
    assert not proof.exists()


def test_claims_cost_no_memory(folder: Path) -> None:
    """Sizes that are claimed are compared with what is there before anything is made of that size."""

    def huge(members: dict[str, bytes]) -> None:
        members["data/weights/weight_7"] = b""
        config = {"config": {"x": tensor_entry("weight_7", (2**40,))}}
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    path = folder / GRAPH
    good = path.read_bytes()
    rewrite_archive(path, huge)
    tracemalloc.start()
    try:
        with pytest.raises(tg.FileError, match="larger than it is"):
            read_graph(path)
        path.write_bytes(good)
        rewrite_archive(path, lambda m: m.update({"data/weights/weight_7": bytes(2**26)}), zipfile.ZIP_DEFLATED)
        tracemalloc.reset_peak()
        with pytest.raises(tg.FileError, match="which no graph's file does"):
            read_graph(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_json_bombs(folder: Path) -> None:
    bombs = {
        "nested too deeply": b'{"kind": "tokgraph.plan", "schema": 1, "sites": ' + b"[" * 10**5,
        "larger than 16 MiB": b"[" + b"0," * 2**23 + b"0]",
        "not JSON": b"9" * 10**5,
    }
    for says, bomb in bombs.items():
        (folder / "plan.json").write_bytes(bomb)
        with pytest.raises(tg.PlanError, match=says):
            tg.Plan.load(folder / "plan.json")
        (folder / MANIFEST).write_bytes(bomb)
        with pytest.raises(tg.FileError, match="JSON|of schema"):
            tg.load_accelerated(folder)


def test_members_of_one_name(folder: Path) -> None:
    """Two readers of the archive may take either."""
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(folder / GRAPH, "a") as archive:
        archive.writestr(archive.namelist()[3], b"{}")
    assert "have one name" in refused(folder)


@pytest.mark.parametrize("seed", range(3))
def test_bits_of_graphs(folder: Path, seed: int) -> None:
    """A changed graph is refused, or read: nothing else is raised, here or in PyTorch's reader."""
    draw = random.Random(seed)
    path = folder / GRAPH
    good = path.read_bytes()
    found = set()
    for _ in range(20):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 8])):
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])])
        try:
            read_graph(path)
            found.add("read")
        except tg.FileError:
            found.add("refused")
    assert "refused" in found


def values(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in JSON."""
    if path:
        yield path
    for key, item in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from values(item, (*path, key))


ODD = (None, True, -1, 2**70, 1.5, "", "x", "../x", [], {}, [[]], {"x": 1}, float("nan"))


def mutations(manifest: Any, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    draw = random.Random(seed)
    paths = [path for path in values(manifest) if path[0] != "files"]
    for path in draw.sample(paths, count):
        changed = copy.deepcopy(manifest)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        if draw.random() < 0.3:
            del holder[path[-1]]
            yield f"without {path}", changed
        else:
            odd = draw.choice(ODD)
            holder[path[-1]] = odd
            yield f"{path} = {odd!r}", changed


def check_mutations(folder: Path, count: int, seed: int) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    refusals = 0
    for what, changed in mutations(manifest, count, seed):
        (folder / MANIFEST).write_text(json.dumps(changed))
        try:
            tg.load_accelerated(folder)
        except tg.TokgraphError:
            refusals += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refusals > count / 3


def test_any_value_of_a_manifest(folder: Path) -> None:
    check_mutations(folder, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_values_of_a_manifest(folder: Path, seed: int) -> None:
    check_mutations(folder, 60, seed)


def test_weights_of_another_type(folder: Path) -> None:
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    save_file({name: x.to(torch.bfloat16) for name, x in tensors.items()}, path)
    assert "is torch.bfloat16 of shape" in refused(folder)


def test_weights_of_another_shape_or_name(folder: Path) -> None:
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].flatten()[:3].clone()}, path)
    assert name in refused(folder)
    save_file({key: x for key, x in tensors.items() if key != name}, path)
    assert f"lacks {name!r}" in refused(folder)


@pytest.mark.parametrize("aliases", ['{"a": "none"}', "[1]", '{"a": {}}', "[" * 10**5, "not JSON", '{"a": ["b"]}'])
def test_aliases_that_are_none(tmp_path: Path, aliases: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"b": torch.zeros(2)}, path, metadata={"tokgraph.aliases": aliases})
    with pytest.raises(tg.FileError):
        stored_tensors(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", b"x" * 100]
)
def test_headers_that_are_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    if data.endswith(b"{}") and len(data) == 10 and data[0] == 2:
        assert stored_tensors(path) == {}
        return
    with pytest.raises(tg.FileError, match="no safetensors file"):
        stored_tensors(path)


def test_structures_that_programs_have() -> None:
    from torch.utils import _pytree as pytree

    for x in (1, {"a": [1, (2, None)], 3: {}}, []):
        assert structure(text := pytree.treespec_dumps(pytree.tree_structure(x))) == text


def test_reading_is_not_what_pickle_does(folder: Path) -> None:
    """The tests above would see code that runs."""
    data = pickle.dumps(Touch(folder / "proof"))
    pickle.loads(data)
    assert (folder / "proof").exists()
    assert callable(read)
