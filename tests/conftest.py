"""A corpus and a configuration so small that a test can train on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from whimbrel.config import Config, load_config
from whimbrel.testing.tiny import tiny_overrides, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text."""
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the tests' own, so that they neither use nor fill the user's."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture
def tiny(corpus: Path) -> Config:
    """A hybrid of 2 layers that trains in a second."""
    return load_config("demo", tiny_overrides(corpus))
