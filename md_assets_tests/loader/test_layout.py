import json
import re
from pathlib import Path

import pytest

from md_assets.core.errors import SettingsError
from md_assets.loader.layout import LatentsLayout, agreed_layout, read_latents_index
from md_assets.storage.mds import ShardError
from md_assets_tests.loader.made_latents import (
    CAPTION,
    IMAGES,
    make_latents,
    metadata,
    write_archive,
    write_ledger,
)

LAYOUT = LatentsLayout(CAPTION, IMAGES, "float16")


def test_a_merged_index_tells_samples_and_layout(tmp_path: Path) -> None:
    index = read_latents_index(make_latents(tmp_path, "jdb", (3, 2)))
    assert index.samples == 5
    assert index.layout == LAYOUT
    assert {"key", "caption", "caption_latents", "latents_256", "latents_512"} < index.columns


def test_a_single_archive_is_told_by_its_ledger(tmp_path: Path) -> None:
    write_archive(tmp_path / "000", 3)
    assert read_latents_index(tmp_path / "000").layout is None
    write_ledger(tmp_path / "000", {**metadata(dtype="float32"), "other": 1})
    assert read_latents_index(tmp_path / "000").layout == LatentsLayout(CAPTION, IMAGES, "float32")


def test_a_strangers_file_beside_foreign_latents_is_not_a_ledger(tmp_path: Path) -> None:
    write_archive(tmp_path / "train", 3)
    (tmp_path / "train.json").write_text("{}")
    assert read_latents_index(tmp_path / "train").layout is None


def test_a_missing_directory_and_a_missing_index_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone does not exist\. Check the path"):
        read_latents_index(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"empty has no index\.json\. Materialize the dataset's latents_index$"):
        read_latents_index(tmp_path / "empty")
    write_archive(tmp_path / "split" / "train", 1)
    with pytest.raises(SettingsError, match=rf"latents_index or name .* {re.escape(str(tmp_path / 'split/train'))}$"):
        read_latents_index(tmp_path / "split")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"version": 1, "shards": []}', '{"version": 2}',
     '{"version": 2, "shards": [], "md_assets": {"caption_latents": [1, 2]}}',
     '{"version": 2, "shards": [], "md_assets": {"caption_latents": [1, 2, 3], "image_latents": {}, "dtype": "int8"}}'],
)  # fmt: skip
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShardError, match="is no index of latents"):
        read_latents_index(tmp_path)


def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = make_latents(tmp_path, "jdb", (2,)) / "index.json"
    index = json.loads(path.read_text())
    index["md_assets"]["samples"] = 3
    path.write_text(json.dumps(index))
    with pytest.raises(ShardError, match="lists 2 samples but says 3"):
        read_latents_index(path.parent)


def test_an_index_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no samples"):
        read_latents_index(make_latents(tmp_path, "jdb", (0,)))


def test_directories_of_the_same_encoders_agree_though_they_have_other_sizes(tmp_path: Path) -> None:
    both = read_latents_index(make_latents(tmp_path, "jdb", (1,)))
    one = read_latents_index(make_latents(tmp_path, "cc12m", (1,), images={256: IMAGES[256]}))
    assert agreed_layout([both, one], 256, None).image_latents[256] == IMAGES[256]
    with pytest.raises(SettingsError, match=r"cc12m/latents was not encoded at image_size 512: it has \[256\]"):
        agreed_layout([both, one], 512, None)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"caption": (1, 3, 5)}, r"caption latents \(1, 3, 4\) and \(1, 3, 5\)"),
        ({"caption": (1, 2, 4)}, r"caption latents \(1, 3, 4\) and \(1, 2, 4\)"),
        ({"images": {256: (16, 4, 4)}}, r"256 px latents \(2, 4, 4\) and \(16, 4, 4\)"),
        ({"dtype": "float32"}, "dtype float16 and float32"),
        ({"latent_mode": "mean"}, "latent_mode sample and mean"),
        ({"caption_length": 2}, "caption_length False and True"),
        ({"caption_length": 2, "text_storage": "trimmed"}, "text_storage full and trimmed"),
    ],
)
def test_directories_that_differ_are_both_named(tmp_path: Path, other: dict, difference: str) -> None:
    indexes = [
        read_latents_index(make_latents(tmp_path, "jdb", (1,))),
        read_latents_index(make_latents(tmp_path, "sa1b", (1,), **other)),
    ]
    with pytest.raises(SettingsError, match=rf"jdb/latents and \S+sa1b/latents cannot be mixed: {difference}"):
        agreed_layout(indexes, 256, None)


def test_foreign_latents_need_a_layout_and_mix_with_ours(tmp_path: Path) -> None:
    ours = read_latents_index(make_latents(tmp_path, "jdb", (1,)))
    foreign = read_latents_index(make_latents(tmp_path, "old", (1,), foreign=True))
    with pytest.raises(SettingsError, match=r"old/latents does not say which shapes .*\{256: \(4, 32, 32\)\}"):
        agreed_layout([ours, foreign], 256, None)
    assert agreed_layout([ours, foreign], 256, LAYOUT) == LAYOUT
    with pytest.raises(SettingsError, match="cannot be mixed: dtype float16 and float32"):
        agreed_layout([ours, foreign], 256, LatentsLayout(CAPTION, IMAGES, "float32"))


def test_a_given_layout_cannot_invent_a_column(tmp_path: Path) -> None:
    foreign = read_latents_index(make_latents(tmp_path, "old", (1,), foreign=True, images={256: IMAGES[256]}))
    with pytest.raises(SettingsError, match=r"not encoded at image_size 512: it has \[256\]"):
        agreed_layout([foreign], 512, LAYOUT)


@pytest.mark.parametrize("shape", [(1, 2), (1, 0, 3), (1, 2.0, 3)])
def test_a_layout_has_shapes_of_three_positive_numbers(shape: tuple) -> None:
    with pytest.raises(SettingsError, match="is no shape of latents"):
        LatentsLayout(shape, IMAGES)
    with pytest.raises(SettingsError, match="is no shape of latents"):
        LatentsLayout(CAPTION, {256: shape})


def test_a_layout_of_another_dtype_is_refused() -> None:
    with pytest.raises(SettingsError, match="bfloat16"):
        LatentsLayout(CAPTION, IMAGES, "bfloat16")
    with pytest.raises(SettingsError, match="latent_mode 'median' is unknown"):
        LatentsLayout(CAPTION, IMAGES, latent_mode="median")
    with pytest.raises(SettingsError, match="text_storage 'some' is unknown"):
        LatentsLayout(CAPTION, IMAGES, text_storage="some")
