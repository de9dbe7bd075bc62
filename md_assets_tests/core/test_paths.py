"""Paths: the contract's, letter by letter, and no archive ID that leads out of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from md_assets.core.errors import SettingsError
from md_assets.core.paths import ARCHIVE_STAGES, DATA_ROOT_VARIABLE, DataRoot, StageDir, checked_archive_id

ROOT = DataRoot(Path("/data"))

# Short texts over the characters that matter, so that Hypothesis finds the dangerous combinations.
HOSTILE_IDS = st.text(st.sampled_from("./\\\0a~ \n"), max_size=8) | st.text(max_size=12)


def test_paths_of_the_contract() -> None:
    mds, latents = ROOT.mds("jdb"), ROOT.latents("jdb", "sdxl1_dfnclipH14")
    assert ROOT.raw("jdb").data("train/000") == Path("/data/jdb/raw/train/000.tar")
    assert ROOT.raw("jdb").ledger("train/000") == Path("/data/jdb/raw/train/000.json")
    assert ROOT.annotations("jdb").data("train") == Path("/data/jdb/annotations/train.parquet")
    assert ROOT.annotations("jdb").ledger("train") == Path("/data/jdb/annotations/train.json")
    assert mds.data("train/000") == Path("/data/jdb/mds/train/000")
    assert mds.index("train") == Path("/data/jdb/mds/train/index.json")
    assert ROOT.mds("sa1b").index("") == Path("/data/sa1b/mds/index.json")
    assert latents.data("train/000") == Path("/data/jdb/mds_latents_sdxl1_dfnclipH14/train/000")
    assert latents.index("train") == Path("/data/jdb/mds_latents_sdxl1_dfnclipH14/train/index.json")
    assert ROOT.kept_archive("jdb", "train/000", ".tgz") == Path("/data/jdb/archives/train/000.tgz")


def test_stages_are_named_in_the_order_of_the_work() -> None:
    assert ARCHIVE_STAGES == ("raw", "mds", "latents")
    assert tuple(d.stage for d in (ROOT.raw("jdb"), ROOT.mds("jdb"), ROOT.latents("jdb", "x_y"))) == ARCHIVE_STAGES


@given(HOSTILE_IDS)
def test_no_accepted_id_leaves_its_directory(archive: str) -> None:
    try:
        checked_archive_id(archive)
    except SettingsError:
        assume(False)
    for stage_dir in (ROOT.annotations("jdb"), ROOT.raw("jdb"), ROOT.mds("jdb")):
        for path in (stage_dir.data(archive), stage_dir.ledger(archive)):
            normal = Path(os.path.normpath(path))
            assert normal.is_relative_to(stage_dir.path)
            assert normal != stage_dir.path
            assert len(normal.parts) == len(stage_dir.path.parts) + 1 + archive.count("/")
            assert not any(part.startswith(".") for part in normal.parts)  # hidden names are for workspaces


@given(HOSTILE_IDS)
def test_an_accepted_id_is_given_back_unchanged(archive: str) -> None:
    try:
        assert checked_archive_id(archive) == archive
    except SettingsError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "archive",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../b",
        "a/..",
        "a//b",
        "a/",
        ".",
        "./a",
        ".hidden",
        "a/.tmp",
        "a\\b",
        "\0",
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        ROOT.raw("jdb").data,
        ROOT.raw("jdb").ledger,
        ROOT.mds("jdb").data,
        lambda archive: ROOT.kept_archive("jdb", archive, ".tgz"),
    ],
)
def test_a_dangerous_id_is_refused_wherever_it_is_used(use: Callable[[str], Path], archive: str) -> None:
    with pytest.raises(SettingsError, match=r"archive ID .* is no relative path"):
        use(archive)


@pytest.mark.parametrize("archive", ["train/000", "part-000001", "cc12m-train-0000", "sa_000000", "val2014", "a..b"])
def test_every_sources_ids_are_accepted(archive: str) -> None:
    assert checked_archive_id(archive) == archive


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(tmp_path / "elsewhere"))
    assert DataRoot.from_environment().path == tmp_path / "elsewhere"


@pytest.mark.parametrize("value", [None, ""])
def test_root_is_datadir_where_the_environment_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DATA_ROOT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(DATA_ROOT_VARIABLE, value)
    assert DataRoot.from_environment().path == tmp_path / "datadir"


def test_a_relative_root_does_not_move_with_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stages hand paths to processes that may start elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_ROOT_VARIABLE, "relative")
    root = DataRoot.from_environment()
    monkeypatch.chdir("/")
    assert root.raw("jdb") == StageDir("jdb", "raw", tmp_path / "relative" / "jdb" / "raw")
