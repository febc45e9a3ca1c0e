"""A model is found by whatever people call it, and the cache is read as the library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.resolver import find_model, hub_name_of, short_name

COMMIT = "c0ffee" + 34 * "1"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ada/finch in a cache: main and the tag v2 at one commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "cache" / "models--ada--finch"
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    (home / "refs" / "pr").mkdir(parents=True)
    for ref in ("main", "v2", "pr/7"):
        (home / "refs" / ref).write_text(COMMIT)
    return home / "snapshots" / COMMIT


@pytest.mark.parametrize(
    "text",
    [
        "ada/finch",
        " 'ada/finch' ",
        "ada/finch@v2",
        "ada/finch@pr/7",
        f"ada/finch@{COMMIT}",
        "https://huggingface.co/ada/finch",
        "huggingface.co/ada/finch/tree/v2",
        "https://huggingface.co/ada/finch/",
        "https://huggingface.co/ada/finch/tree/v2",
        "https://huggingface.co/ada/finch/blob/main/config.json?download=true",
        "'https://hf.co/ada/finch#intro'",
    ],
)
def test_a_name_is_found_in_the_cache_however_it_is_spelt(snapshot: Path, text: str) -> None:
    assert find_model(text) == snapshot


def test_the_address_of_another_endpoint_is_understood(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example.org")
    assert find_model("https://hub.example.org/ada/finch") == snapshot


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ada/wren", "ada/wren"),
        ("ada/finch@v3", "ada/finch@v3"),
        ("https://huggingface.co/ada/finch/tree/v3", "ada/finch@v3"),
        (f"ada/finch@{'0' * 40}", f"ada/finch@{'0' * 40}"),
    ],
)
def test_a_name_that_the_cache_does_not_have_stays_a_name(snapshot: Path, text: str, name: str) -> None:
    assert find_model(text) == Path(name)
    assert str(hub_name_of(find_model(text))) == name


@pytest.mark.parametrize("text", ["ada/finch@../../../../models", "ada/..", "../finch", "ada/finch@", "a/b/c", "finch"])
def test_what_leads_elsewhere_is_no_name(snapshot: Path, text: str) -> None:
    assert hub_name_of(find_model(text)) is None


def test_a_folder_goes_before_a_name_and_a_file_of_it_means_the_folder(snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ada" / "finch"
    folder.mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").touch()
    assert find_model("ada/finch") == Path("ada/finch")
    assert hub_name_of(find_model("ada/finch")) is None
    for text in (f"{folder}/model-00001-of-00002.safetensors", folder.as_uri()):
        assert find_model(text) == folder


def test_the_shortest_text_that_finds_a_model_again(snapshot: Path, tmp_path: Path) -> None:
    assert short_name(snapshot) == "ada/finch"
    assert short_name(Path("ada/wren@v1")) == "ada/wren@v1"
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    assert short_name(snapshot) == f"ada/finch@{COMMIT}"
    assert find_model(short_name(snapshot)) == snapshot
    (tmp_path / "model").mkdir()
    assert short_name(tmp_path / "model") == "model"


@pytest.mark.parametrize(
    "address", ["https://example.org/ada/finch", "https://huggingface.co/spaces/ada", "s3://b/a/c"]
)
def test_an_address_that_leads_to_no_model_is_refused(snapshot: Path, address: str) -> None:
    with pytest.raises(SlerpMergeError) as caught:
        find_model(address)
    assert caught.value.message == f"{address} is an address, and no model."
