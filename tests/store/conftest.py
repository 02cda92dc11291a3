"""Programs saved once for all tests: leave their weights as they are."""

from __future__ import annotations

import pytest

import tokgraph as tg
from tests.harness import Captured, captured_tiny
from tests.store.programs import THINNED, G, Saved, rich_spec


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two blocks, both tasks thinned in the second: leave its weights as they are."""
    return Saved(captured_tiny(2, dynamic=True).apply(THINNED), tmp_path_factory.mktemp("saved") / "program")


@pytest.fixture(scope="session")
def rich() -> Captured:
    return Captured.of(rich_spec())


@pytest.fixture(scope="session")
def rich_saved(rich: Captured, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Own projections in a site of generation: leave its weights as they are."""
    site = tg.DropSite(G, 1, 2, 0.5, projections="own")
    return Saved(rich.apply(tg.Plan((site,), exact=True)), tmp_path_factory.mktemp("rich") / "program")
