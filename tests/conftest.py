"""What every test gets: the parents it made are hashed before and after, so that none is ever written to."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch only wait for each other over models this small
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: trains models, some minutes; leave out with -m 'not slow'")


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Parents:
    """Folders that must come out of a test as they went in."""

    def __init__(self) -> None:
        self.prints: dict[Path, dict[str, str]] = {}

    def watch(self, *folders: Path) -> None:
        for folder in folders:
            self.prints[folder] = fingerprint(folder)


@pytest.fixture
def parents() -> Parents:
    """`parents.watch(folder, ...)`: these are compared, file by file, when the test is over."""
    watched = Parents()
    yield watched
    for folder, before in watched.prints.items():
        assert fingerprint(folder) == before, f"{folder} was written to"


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory, monkeypatch):
    """No test sees this person's settings or models, or another test's."""
    folder = tmp_path_factory.mktemp("person")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.setenv("APPDATA", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    if sys.platform == "darwin":
        monkeypatch.setenv("HOME", str(folder))
