"""Facts of tasks that are found in processes of their own are what the whole program's are."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokgraph as tg
from tests import tiny
from tokgraph import apart
from tokgraph.apart import Asked, ModelFile, Summary, can_be_parted, summarise_apart
from tokgraph.report.summary import batches_of, one_sample, summarise, with_nodes

ASKED = Asked(nodes=True)
MODEL = """
from tests import tiny
import tokgraph as tg


def build():
    spec = tiny.build(layers=2, dynamic=True)
    return tg.ModelSpec(spec.model.to("meta"), spec.tasks)
"""


def bare(**options: object) -> tg.ModelSpec:
    spec = tiny.build(layers=2, dynamic=True, **options)
    return tg.ModelSpec(spec.model.to("meta"), spec.tasks)


def whole(facts: tg.Facts, asked: Asked = ASKED) -> Summary:
    summary = summarise(facts, sizes=asked.sizes or one_sample(batches_of(facts)), convention=asked.convention)
    return Summary(summary, with_nodes(summary, facts) if asked.nodes else {})


@pytest.mark.slow
def test_parts_make_the_whole() -> None:
    spec = bare()
    program = tg.capture(spec)
    facts = {n: tg.analyze(tg.Program(apart._alone(spec, n), {n: graph})) for n, graph in program.items()}
    for asked in (ASKED, Asked(({"batch": 3},), "fastv")):
        sizes = asked.sizes or one_sample([batch for of in facts.values() for batch in batches_of(of)])
        assert sizes == asked.sizes or sizes == ({"batch": 1},)
        parts = {name: apart._part(of, name, sizes, asked) for name, of in facts.items()}
        found, expected = apart._together(spec, parts), whole(tg.analyze(program), asked)
        assert list(found.summary) == list(expected.summary)
        assert found == expected


@pytest.mark.slow
def test_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    (tmp_path / "model.py").write_text(MODEL)
    file = ModelFile(str(tmp_path / "model.py"), {})
    assert summarise_apart(file, bare(), ASKED) == whole(tg.analyze(tg.capture(bare())))
    assert summarise_apart(replace_file(file, tmp_path), bare(), ASKED) is None


def replace_file(file: ModelFile, folder: Path) -> ModelFile:
    (folder / "broken.py").write_text("raise RuntimeError('not twice')")
    return ModelFile(str(folder / "broken.py"), file.settings)


def test_only_what_is_large_has_no_weights_and_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = bare()
    monkeypatch.setattr(apart, "_cores", lambda: 2)
    assert not can_be_parted(spec)
    monkeypatch.setattr(apart, "_LARGE", 1)
    assert can_be_parted(spec)
    assert not can_be_parted(tiny.build(layers=2))
    assert not can_be_parted(apart._alone(spec, next(iter(spec.tasks))))
    monkeypatch.setattr(apart, "_cores", lambda: 1)
    assert not can_be_parted(spec)
