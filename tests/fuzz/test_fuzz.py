"""Cases by seed, bugs that are put in on purpose, and the shrinker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tokgraph as tg
from tests.fuzz.case import OPTIONS, Case, PlanCase, Site, apart, draw, sensible
from tests.fuzz.figures import Figures, outcome
from tests.fuzz.judge import Verdict
from tests.fuzz.planted import PLANTED
from tests.fuzz.run import names_of, verdicts
from tests.fuzz.shrink import alone, shrunk


@pytest.mark.filterwarnings("ignore")  # what is drawn at random may well be warned of
def test_what_is_accepted_is_right() -> None:
    """One decoder; `make fuzz` judges more of them."""
    _, judged = outcome(1)
    assert not isinstance(judged, str), f"the decoder does not run by itself: {judged}"
    assert [verdict for verdict in judged if verdict.failed] == []


@pytest.mark.slow
@pytest.mark.parametrize("bug", list(PLANTED)[:5])  # the others take more decoders: docs/fuzz.md
@pytest.mark.filterwarnings("ignore")
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug](monkeypatch)
    assert any(v.failed for seed in range(60) for v in outcome(seed)[1] if isinstance(v, Verdict))


def wrong(case: Case) -> Iterator[Verdict]:
    """A judge that finds fault with windows and frozen rows."""
    for plan in case.plans:
        bad = case.mask == "window" and any(site.mode == "freeze" for site in plan.sites)
        yield Verdict("loss", "", "relative error 1") if bad else Verdict("accepted")


def test_a_failure_is_shrunk_to_what_it_takes() -> None:
    sites = (Site(1, 3, 0.25, "norm"), Site(1, 2, 0.75, "random", "freeze", seed=2))
    given = Case(
        0, sensible({n: o[-1] for n, o in OPTIONS.items()} | {"mask": "window"}), (PlanCase(), PlanCase(sites, True))
    )
    small, verdict = shrunk(given, lambda case: list(wrong(case)))
    plain = {name: options[0] for name, options in OPTIONS.items()}
    assert small.choices == {**plain, "layers": 2, "mask": "window"}
    assert small.plans == (PlanCase((Site(0, 1, mode="freeze"),)),)
    assert verdict.kind == "loss"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_failure_has_a_file_that_runs_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PLANTED["rows come back in other places"](monkeypatch)
    plain = {name: options[0] for name, options in OPTIONS.items()}
    failing = Case(3, plain, (PlanCase((Site(0, 1),)),))
    (verdict,) = verdicts(failing)
    text = alone(failing, verdict)
    assert "tests." not in text
    exec(compile(text, "alone.py", "exec"), {"__name__": "__main__"})
    assert "Verdict(kind='loss'" in capsys.readouterr().out


@pytest.mark.slow
def test_sizes_that_torch_cannot_word_are_inferred() -> None:
    """Of case 778 ``torch.export`` finds that its tokens are 37/12 or more, and fails when it wants to say so. The batch that it
    infers is that of the example.
    """
    (graph,) = tg.capture(names_of(draw(778))["build"]()).values()
    assert [d.name for d in graph.dimensions if d.symbol is not None and d.input == "ids"] == ["tokens"]


def test_a_seed_is_a_case_and_cases_are_plain_data() -> None:
    for seed in range(200):
        case = draw(seed)
        assert case == draw(seed)
        assert Case.from_json(case.to_json()) == case
        assert sensible(case.choices) == case.choices
        for plan in case.plans:
            assert all(0 <= s.start < s.end <= case.layers for s in plan.sites)
            assert all(apart(a, b) for i, a in enumerate(plan.sites) for b in plan.sites[:i])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_choice_is_a_decoder_that_runs(name: str) -> None:
    """Also under other names of the vocabulary: every choice alone, and beside the last choices of all others."""
    plain = {n: o[0] for n, o in OPTIONS.items()}
    for choice in OPTIONS[name]:
        names = names_of(Case(0, sensible({**plain, name: choice})))
        model = names["build"]().model
        assert model(**names["batch"](1)) is not None


def test_figures_of_runs_add_up(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for seeds in ((0, 1), (5, 2)):
        figures = Figures.load(file)
        for seed in seeds:
            figures.add((seed, [Verdict("accepted"), Verdict("refused", "TG006: no")]))
        figures.save(file)
    figures = Figures.load(file)
    figures.add((9, [Verdict("loss")]))
    figures.add((10, "TypeError"))
    assert (figures.cases, figures.plans, figures.accepted, figures.refused["TG006: no"]) == (6, 9, 4, 4)
    assert (figures.found, figures.broken) == ({"9": ["loss"]}, {"10": "TypeError"})
    assert list(figures.missing(0, 8)) == [3, 4, 6, 7]
    assert "6 decoders, 9 plans: 4 accepted, 4 refused, 1 failures" in figures.table()


def test_the_page_shows_the_figures() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "fuzz.md").read_text(encoding="utf-8")
    assert Figures.load(docs / "fuzz.json").shown_in(page) == page
