"""Progress: a line every few seconds, whose numbers are right also for work that was resumed."""

import pytest

from md_assets.core.progress import Progress, ProgressLines, describe


@pytest.mark.parametrize(
    ("progress", "start", "elapsed_s", "expected"),
    [
        (
            Progress("train/000", "fetches", 600_000_000, 1_000_000_000, "bytes"),
            200_000_000,  # fetched by an earlier run
            4.0,
            "train/000 fetches: 600/1,000 MB, 100.0 MB/s, ETA 0:04",
        ),
        (
            Progress("train/000", "fetches", 5_000_000, None, "bytes"),
            0,
            2.0,
            "train/000 fetches: 5 MB, 2.5 MB/s",
        ),
        (
            Progress("train/000", "prepares images", 520, 1000, "bytes", images=3100),
            0,
            10.0,
            "train/000 prepares images: 3,100 images, 52%, 310 images/s, ETA 0:09",
        ),
        (
            Progress("sa_000000", "encodes", 1500, 11_186, "images"),
            0,
            15.0,
            "sa_000000 encodes: 1,500/11,186 images, 100 images/s, ETA 1:37",
        ),
    ],
)
def test_a_line_says_what_is_done_how_fast_and_how_long_still(
    progress: Progress, start: int, elapsed_s: float, expected: str
) -> None:
    assert describe(progress, start, elapsed_s) == expected


def test_no_time_is_promised_before_anything_was_done() -> None:
    assert "ETA" not in describe(Progress("a", "fetches", 5, 10, "bytes"), 5, 1.0)


class Lines:
    """Progress lines with a clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.written: list[str] = []
        self.report = ProgressLines("jdb", self.written.append, every_s=5.0, clock=lambda: self.now_s)

    def at(self, now_s: float, done: int, archive: str = "train/000") -> None:
        self.now_s = now_s
        self.report(Progress(archive, "encodes", done, 100, "images"))


def test_a_line_comes_every_few_seconds_however_often_it_is_called() -> None:
    lines = Lines()
    for tenth in range(121):
        lines.at(tenth / 10, tenth // 2)
    assert lines.written == [
        "jdb train/000 encodes: 25/100 images, 5 images/s, ETA 0:15",
        "jdb train/000 encodes: 50/100 images, 5 images/s, ETA 0:10",
    ]


def test_short_work_is_silent() -> None:
    lines = Lines()
    for second in range(20):
        lines.at(second, 100, archive=f"train/{second:03}")
    assert lines.written == []


def test_another_archive_starts_its_own_clock() -> None:
    lines = Lines()
    lines.at(0, 0)
    lines.at(100, 40, archive="train/001")
    lines.at(105, 50, archive="train/001")
    assert lines.written == ["jdb train/001 encodes: 50/100 images, 2 images/s, ETA 0:25"]
