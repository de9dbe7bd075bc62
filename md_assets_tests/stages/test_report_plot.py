"""The report's pictures: what is in them, and that they stay small."""

import base64
import io
from collections import Counter

import numpy as np
from PIL import Image

from md_assets.stages.report import Report, StageCounts
from md_assets.stages.report_plot import OUTLIER_COLOR, WIDTH_PX, fates, latents_picture, samples_picture, short
from md_assets_tests.stages.made_report import CAPTION, NAMES, ROOT, latents_dir, made_counts, made_group

LIMIT_BYTES = 60_000
"""Of a picture in the event log."""


def picture(uri: str | None) -> np.ndarray:
    assert uri is not None and uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def red_pixels(pixels_HWC: np.ndarray) -> int:
    red = np.array([int(OUTLIER_COLOR[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(pixels_HWC - red).max(-1) < 40).sum())


def test_every_sample_that_raw_read_is_somewhere() -> None:
    ((label, fate),) = fates(Report(tuple(made_counts()), ()))
    assert label == "jdb"
    assert fate == {
        "latents": 60,
        "mds, not encoded": 20,
        "raw, not in mds": 5,
        "rejected: too_small": 7,
        "rejected: undecodable": 3,
        "rejected: no_caption": 5,
    }
    assert fate.total() == 100


def test_samples_are_told_for_each_pair_of_encoders() -> None:
    other = StageCounts(latents_dir(tag="other"), 400, 1, 10, 10)
    rows = fates(Report((*made_counts(), other), ()))
    assert [(label, fate["latents"], fate["mds, not encoded"]) for label, fate in rows] == [
        ("jdb tiny", 60, 20),
        ("jdb other", 10, 70),
    ]


def test_samples_of_a_subset_are_not_told_twice() -> None:
    subset = StageCounts(ROOT.mds("jdb", "minres512"), 400, 1, 80, 10, Counter(not_in_subset=70))
    assert fates(Report((*made_counts(), subset), ())) == fates(Report(tuple(made_counts()), ()))


def test_a_dataset_without_latents_is_told_too() -> None:
    ((label, fate),) = fates(Report(tuple(made_counts()[:2]), ()))
    assert (label, fate["latents"], fate["mds, not encoded"]) == ("jdb", 0, 80)


def test_pictures_are_as_wide_as_the_ui_shows_them() -> None:
    report = Report(tuple(made_counts()), (made_group(3),))
    for uri in (samples_picture(report), latents_picture(report)):
        assert picture(uri).shape[1] == WIDTH_PX


def test_nothing_there_gives_no_picture() -> None:
    assert samples_picture(Report((), ())) is None
    assert latents_picture(Report(tuple(made_counts()), ())) is None


def test_outliers_are_red() -> None:
    sound, off = made_group(30), made_group(30, changes={5: {CAPTION: 9.0}, 6: {NAMES[4]: 9.0}})
    assert red_pixels(picture(latents_picture(Report((), (sound,))))) == 0
    assert red_pixels(picture(latents_picture(Report((), (off,))))) > 10


def test_pictures_of_large_datasets_stay_small() -> None:
    groups = tuple(made_group(2000, dataset) for dataset in ("cc12m", "coco2014", "diffdb", "jdb", "sa1b", "textcaps"))
    counts = tuple(count for group in groups for count in made_counts(group.stage_dir.dataset))
    for uri in (latents_picture(Report((), groups)), samples_picture(Report(counts, groups))):
        assert uri is not None and 5_000 < len(uri) < LIMIT_BYTES


def test_counts_are_short() -> None:
    assert [short(n) for n in (0, 9_999, 40_504, 13_800_000, 2.5e9)] == ["0", "9,999", "40.5 k", "13.8 M", "2.5 G"]
