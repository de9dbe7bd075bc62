from pathlib import Path

import pytest

from md_assets.core.errors import SettingsError
from md_assets.loader.streams import LatentsStream, checked_streams, count_samples, samples_by_directory
from md_assets_tests.loader.made_latents import make_latents


def test_paths_and_streams_are_taken_alone_or_in_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = LatentsStream("b", repeat=2)
    assert [s.directory for s in checked_streams("a")] == [tmp_path / "a"]
    assert [s.directory for s in checked_streams(Path("a"))] == [tmp_path / "a"]
    assert checked_streams(stream) == (stream,)
    assert checked_streams(["a", stream]) == (LatentsStream("a"), stream)


@pytest.mark.parametrize(
    "weights",
    [{"proportion": 0}, {"repeat": -1.0}, {"choose": 0}, {"repeat": float("nan")}, {"repeat": 1, "choose": 1}],
)
def test_a_stream_has_at_most_one_positive_weight(weights: dict) -> None:
    with pytest.raises(SettingsError, match="do not fit"):
        LatentsStream("a", **weights)


def test_the_cache_of_a_remote_stream_is_not_its_source(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="both local and remote"):
        LatentsStream(tmp_path / "a", remote=f"{tmp_path}/a/")


def test_streams_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no streams"):
        checked_streams([])
    with pytest.raises(SettingsError, match="a is given twice"):
        checked_streams([f"{tmp_path}/a", LatentsStream(f"{tmp_path}/a/")])
    with pytest.raises(SettingsError, match="b has no proportion"):
        checked_streams([LatentsStream("a", proportion=1.0), LatentsStream("b", repeat=1.0)])


def test_samples_are_counted_without_weights(tmp_path: Path) -> None:
    jdb, cc12m = make_latents(tmp_path, "jdb", (3, 2)), make_latents(tmp_path, "cc12m", (4,))
    streams = [str(jdb), LatentsStream(cc12m, repeat=3)]
    assert samples_by_directory(streams) == {jdb: 5, cc12m: 4}
    assert count_samples(streams) == 9
    assert count_samples(cc12m) == 4
    with pytest.raises(SettingsError, match="gone does not exist"):
        count_samples([jdb, tmp_path / "gone"])
