"""The mds stage on captions of every kind: by number, with scores, cleaned, of the archive itself."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from md_assets.core.ledger import Reason
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.coco2014 import SPEC as COCO2014
from md_assets.datasets.diffdb import SPEC as DIFFDB
from md_assets.datasets.sa1b import SPEC as SA1B
from md_assets.datasets.textcaps import SPEC as TEXTCAPS
from md_assets.storage import captions as captions_module
from md_assets.storage.caption_cleaning import CLEANED_CHARACTERS
from md_assets_tests.stages.made_captions import Captioned
from md_assets_tests.stages.test_annotations_formats import put_coco, put_table, put_texts

ARCHIVE = "part-000001"


@pytest.fixture
def captioned(tmp_path: Path) -> Callable[[DatasetSpec], Captioned]:
    return lambda spec: Captioned(spec, DataRoot(tmp_path / "data"), tmp_path / "captions")


# Scores


def scored(diffdb: Captioned, image: Sequence[float | None], prompt: Sequence[float | None]) -> None:
    """Publish an archive of samples `0`, `1`, … with these scores."""
    put_table(
        diffdb,
        image_name=[f"{n}.webp" for n in range(len(image))],
        image_nsfw=pa.array(image, pa.float32()),
        prompt_nsfw=pa.array(prompt, pa.float32()),
    )
    diffdb.annotations()
    diffdb.raw(ARCHIVE, [f"{n}" for n in range(len(image))])


def test_scores_above_the_threshold_are_rejected_and_just_the_threshold_is_kept(
    captioned: Callable[[DatasetSpec], Captioned],
) -> None:
    above = float(np.nextafter(np.float32(0.2), np.float32(1)))
    diffdb = captioned(DIFFDB)
    scored(diffdb, [0.2, above, 0.0, 0.1, 2.0, 0.19], [0.0, 0.0, above, 0.2, 0.0, 0.1])
    ledger = diffdb.mds(ARCHIVE)
    assert ledger.rejected == {Reason.NSFW: [f"{ARCHIVE}/{n}" for n in (1, 2, 4)]}
    assert (ledger.read, ledger.kept) == (6, 3) and list(diffdb.captions(ARCHIVE)) == ["0", "3", "5"]


def test_scores_that_are_no_number_or_absent_are_rejected(captioned: Callable[[DatasetSpec], Captioned]) -> None:
    diffdb = captioned(DIFFDB)
    scored(diffdb, [math.nan, None, 0.1, 0.1, math.inf, 0.1], [0.1, 0.1, math.nan, None, 0.1, 0.1])
    assert diffdb.mds(ARCHIVE).rejected == {Reason.NSFW: [f"{ARCHIVE}/{n}" for n in range(5)]}


@pytest.mark.parametrize(("threshold", "kept"), [(0, 1), (0.5, 2), (1.99, 2), (2, 3)])
def test_the_threshold_is_a_setting_and_part_of_the_fingerprint(
    captioned: Callable[[DatasetSpec], Captioned], threshold: float, kept: int
) -> None:
    diffdb = captioned(DIFFDB)
    scored(diffdb, [0.0, 0.5, 2.0, math.nan], [0.0, 0.0, 0.0, 0.0])
    images = ImageSettings(safety_threshold=threshold)
    ledger = diffdb.mds(ARCHIVE, images)
    assert ledger.kept == kept and ledger.settings["safety_threshold"] == threshold
    assert ledger.settings == mds_settings(DIFFDB, images)


def test_no_row_is_no_caption_and_a_score_is_judged_before_the_text(
    captioned: Callable[[DatasetSpec], Captioned],
) -> None:
    diffdb = captioned(DIFFDB)
    names = ["unsafe_empty", "safe_empty", "orphan"]
    put_table(
        diffdb,
        image_name=[f"{name}.webp" for name in names],
        prompt=["", " \0", "x"],
        image_nsfw=pa.array([0.9, 0.1, 0.1], pa.float32()),
    )
    diffdb.annotations()
    diffdb.raw(ARCHIVE, ["no_row", "unsafe_empty", "safe_empty"])
    ledger = diffdb.mds(ARCHIVE)
    no_caption = [f"{ARCHIVE}/no_row", f"{ARCHIVE}/safe_empty"]
    assert ledger.rejected == {Reason.NO_CAPTION: no_caption, Reason.NSFW: [f"{ARCHIVE}/unsafe_empty"]}
    assert ledger.details == {"orphan_captions": 1}


# By number


def test_captions_are_joined_by_number_and_orphans_lie_between_the_archives_samples(
    captioned: Callable[[DatasetSpec], Captioned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of raw's rejected samples neither is an orphan's range shorter nor are the captions orphans."""
    monkeypatch.setattr(captions_module, "ROW_GROUP_ROWS", 2)
    sa1b = captioned(SA1B)
    numbers = [1, 4, 5, 6, 8, 9, 12, 13, 20]
    put_texts(sa1b, {f"sa_{number}.txt": f"caption {number}" for number in reversed(numbers)})
    sa1b.annotations()
    sa1b.raw(
        "sa_000000", ["sa_9", "sa_6", "sa_7", "unnumbered"], {"too_small": ["sa_5", "sa_12"], "unsafe_member": ["x"]}
    )
    ledger = sa1b.mds("sa_000000")
    assert sa1b.captions("sa_000000") == {"sa_9": "caption 9", "sa_6": "caption 6"}
    assert ledger.rejected == {Reason.NO_CAPTION: ["sa_000000/sa_7", "sa_000000/unnumbered"]}
    assert ledger.details == {"orphan_captions": 1}  # sa_8


@pytest.mark.parametrize("names", [[], ["unnumbered"]])
def test_an_archive_without_numbers_has_no_captions(
    captioned: Callable[[DatasetSpec], Captioned], names: Sequence[str]
) -> None:
    sa1b = captioned(SA1B)
    put_texts(sa1b, {"sa_1.txt": "x"})
    sa1b.annotations()
    sa1b.raw("sa_000003", names)
    ledger = sa1b.mds("sa_000003")
    assert (ledger.kept, ledger.details) == (0, {"orphan_captions": 0})


# First of several


def test_of_several_captions_the_first_is_stored(captioned: Callable[[DatasetSpec], Captioned]) -> None:
    coco2014 = captioned(COCO2014)
    images = [{"id": 1, "file_name": "COCO_1.jpg"}, {"id": 2, "file_name": "COCO_2.jpg"}]
    annotations = [{"image_id": n, "caption": text} for n, text in [(1, "first"), (2, "orphan"), (1, "second")]]
    put_coco(coco2014, {"images": images, "annotations": annotations})
    coco2014.annotations()
    coco2014.raw("val2014", ["COCO_1"])
    ledger = coco2014.mds("val2014")
    assert coco2014.captions("val2014") == {"COCO_1": "first"} and ledger.details == {"orphan_captions": 1}


# Of the archive itself

TEXTS = {
    "long": "wörd " * 20_000,
    "emoji": "👩‍🚀 ☃ 漢字",
    "html": "<b>bold</b> &amp; https://example.org",
    "lines": "  two\nlines\r\n",
    "nul": "a\0b\0",
}
WITHOUT: Mapping[str, str | None] = {"absent": None, "empty": "", "space": " \t\n\u3000", "nuls": "\0 \0"}


def test_captions_of_the_archive_are_stored_as_they_are_but_for_nul(
    captioned: Callable[[DatasetSpec], Captioned],
) -> None:
    textcaps = captioned(TEXTCAPS)
    textcaps.raw("val/00000", {**TEXTS, **WITHOUT}, orphans=3)
    ledger = textcaps.mds("val/00000")
    assert textcaps.captions("val/00000") == {**TEXTS, "nul": "ab"}
    assert ledger.rejected == {Reason.NO_CAPTION: [f"val/00000/{name}" for name in WITHOUT]}
    assert ledger.details == {"orphan_captions": 3}  # those that raw counted in the archive
    assert "ftfy" not in ledger.versions


def test_captions_are_cleaned_where_the_dataset_says_so(captioned: Callable[[DatasetSpec], Captioned]) -> None:
    cc12m, archive = captioned(CC12M), "cc12m-train-0000"
    texts = {
        **TEXTS,
        "stop": "图片.",
        "chinese": "图片",
        "refused": "<![ x>",
        "twice": "%253Cb%253Ebold",
        "ff": "&#0;a",
    }
    cc12m.raw(archive, {**texts, **WITHOUT}, orphans=1)
    ledger = cc12m.mds(archive)
    stored = cc12m.captions(archive)
    assert stored.pop("long") == ("wörd " * 20_000)[:CLEANED_CHARACTERS].strip()
    assert stored == {
        "emoji": "👩‍🚀 ☃",
        "html": "bold",
        "lines": "two lines",
        "nul": "ab",
        "twice": "bold",
        "ff": "\ufffda",
    }
    without = ["stop", "chinese", "refused", *WITHOUT]
    assert ledger.rejected == {Reason.NO_CAPTION: [f"{archive}/{name}" for name in without]}
    assert ledger.details == {"orphan_captions": 1} and ledger.settings["caption_cleaning"] == "deepfloyd"
    assert {"beautifulsoup4", "diffusers", "ftfy", "mosaicml-streaming"} <= ledger.versions.keys()


def test_the_cleaner_is_imported_for_the_first_caption_only(
    captioned: Callable[[DatasetSpec], Captioned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)  # importing it fails
    monkeypatch.setattr("md_assets.storage.caption_cleaning._cleaner", _uncached_cleaner())
    cc12m, archive = captioned(CC12M), "cc12m-train-0000"
    cc12m.raw(archive, WITHOUT)
    assert cc12m.mds(archive).kept == 0
    uncleaned = replace(cc12m, spec=replace(CC12M, caption_cleaning=""))
    uncleaned.raw(archive, {"a": "A <b>"})
    assert uncleaned.mds(archive).kept == 1
    with pytest.raises(Exception, match="bs4"):
        cc12m.mds(archive)


def _uncached_cleaner() -> object:
    from md_assets.storage.caption_cleaning import _cleaner

    return _cleaner.__wrapped__
