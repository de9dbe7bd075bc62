"""What all stages share: passing over, waiting, and errors of every kind as one of the archive."""

import errno
import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets import __version__
from md_assets.core.errors import ArchiveError, CorruptArchiveError, MdAssetsError, SettingsError, SourceError
from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.stages.once import (
    Made,
    Outcome,
    archive_errors,
    current,
    once,
    published,
    recorded,
    refuse_pruned,
    upstream_ledger,
    versions_of,
    withdraw,
)
from md_assets.storage.publish import output_file, scratch, with_files, workspace

SETTINGS = {"size": 1}
INPUTS = {"archive": "abc"}


@pytest.fixture
def stage_dir(tmp_path: Path) -> StageDir:
    return DataRoot(tmp_path).raw("jdb")


def make(content: bytes = b"data", **changes: Any) -> Callable[[Path], Made]:
    """Work that leaves a file of this content."""

    def work(own: Path) -> Made:
        file = scratch(own, "out") / "000.tar"
        file.write_bytes(content)
        ledger = Ledger(
            dataset="jdb", archive="train/000", stage="raw", read=3, kept=2, rejected={"too_small": ["x"]}, bytes_in=9,
            bytes_out=0, seconds=0.0, source={}, inputs=INPUTS, settings=SETTINGS, versions={}, files=(),
        )  # fmt: skip
        return Made(file, with_files(replace(ledger, **changes), (output_file(file, "train/000.tar"),)))

    return work


def run(stage_dir: StageDir, work: Callable[[Path], Made] | None = None, **options: Any) -> Outcome:
    return once(stage_dir, "train/000", SETTINGS, INPUTS, work or make(), **options)


def not_again(_: Path) -> Made:
    pytest.fail("it was done twice")


def failing(error: BaseException) -> Callable[[Path], Made]:
    def work(own: Path) -> Made:
        (scratch(own, "out") / "half").write_bytes(b"half")
        raise error

    return work


def test_done_once_then_passed_over(stage_dir: StageDir) -> None:
    def slow(own: Path) -> Made:
        time.sleep(0.01)
        return make()(own)

    first = run(stage_dir, slow)
    assert not first.passed_over and first.ledger.seconds >= 0.01
    assert stage_dir.data("train/000").read_bytes() == b"data"
    again = run(stage_dir, not_again)
    assert again == Outcome(first.ledger, passed_over=True)
    assert sorted(p.name for p in (stage_dir.path / "train").iterdir()) == ["000.json", "000.tar"]


@pytest.mark.parametrize(("settings", "inputs"), [({"size": 2}, INPUTS), (SETTINGS, {"archive": "def"})])
def test_other_settings_or_inputs_are_done_again(stage_dir: StageDir, settings: Any, inputs: Any) -> None:
    run(stage_dir)
    work = make(b"other", settings=settings, inputs=inputs)
    outcome = once(stage_dir, "train/000", settings, inputs, work)
    assert not outcome.passed_over
    assert stage_dir.data("train/000").read_bytes() == b"other"
    assert current(stage_dir, "train/000", settings, inputs) == outcome.ledger
    assert current(stage_dir, "train/000", SETTINGS, INPUTS) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.data("train/000").unlink(),
        lambda d: d.data("train/000").write_bytes(b"dat"),
        lambda d: d.ledger("train/000").write_text("{"),
        lambda d: d.ledger("train/000").write_bytes(b"\xff\0"),
        lambda d: d.ledger("train/000").write_text(d.ledger("train/000").read_text().replace('"abc"', '"abd"')),
        lambda d: d.ledger("train/000").write_text(d.ledger("train/000").read_text().replace('"x"', '"y"')),
        lambda d: d.ledger("train/000").unlink(),
    ],
    ids=["no data", "cut data", "broken ledger", "binary ledger", "other input", "edited ledger", "no ledger"],
)
def test_what_is_not_whole_is_done_again(stage_dir: StageDir, damage: Callable[[StageDir], Any]) -> None:
    run(stage_dir)
    damage(stage_dir)
    assert not run(stage_dir).passed_over
    assert published(stage_dir, "train/000") is not None
    assert stage_dir.data("train/000").read_bytes() == b"data"


def test_what_a_killed_run_left_beside_a_published_archive_is_tidied_up(stage_dir: StageDir) -> None:
    run(stage_dir)
    left = stage_dir.path / "train" / ".000.tmp" / "out"
    left.mkdir(parents=True)
    assert run(stage_dir, not_again).passed_over
    assert not left.parent.exists()


def test_failed_work_leaves_what_was_published_and_nothing_else(stage_dir: StageDir) -> None:
    run(stage_dir)
    before = {p: p.read_bytes() for p in stage_dir.path.rglob("*") if p.is_file()}
    with pytest.raises(ArchiveError, match=r"^jdb train/000: no\. Do it$"):
        once(stage_dir, "train/000", {"size": 2}, INPUTS, failing(MdAssetsError("no", "Do it")))
    assert {p: p.read_bytes() for p in stage_dir.path.rglob("*") if p.is_file()} == before
    assert not (stage_dir.path / "train" / ".000.tmp").exists()


def test_two_at_once_one_works_and_the_other_waits(stage_dir: StageDir) -> None:
    working, waiting = threading.Event(), threading.Event()
    outcomes: list[Outcome] = []

    def slow(own: Path) -> Made:
        working.set()
        assert waiting.wait(10)
        return make()(own)

    one = threading.Thread(target=lambda: outcomes.append(run(stage_dir, slow)))
    one.start()
    assert working.wait(10)
    other = run(stage_dir, not_again, on_wait=waiting.set)
    one.join(10)
    assert other.passed_over and outcomes == [replace(other, passed_over=False)]


def test_who_waited_for_one_that_failed_does_the_work(stage_dir: StageDir) -> None:
    working, waiting = threading.Event(), threading.Event()
    errors: list[ArchiveError] = []

    def fails(own: Path) -> Made:
        working.set()
        assert waiting.wait(10)
        raise MdAssetsError("no")

    def attempt() -> None:
        try:
            run(stage_dir, fails)
        except ArchiveError as error:
            errors.append(error)

    one = threading.Thread(target=attempt)
    one.start()
    assert working.wait(10)
    assert not run(stage_dir, on_wait=waiting.set).passed_over
    one.join(10)
    assert len(errors) == 1 and published(stage_dir, "train/000") is not None


def test_nobody_is_told_to_wait_where_nobody_works(stage_dir: StageDir) -> None:
    assert not run(stage_dir, on_wait=lambda: pytest.fail("it waited")).passed_over


@pytest.mark.parametrize(
    ("error", "text", "reason", "transient"),
    [
        (SourceError("a: gone", "Look", reason="not_found", transient=False), "a: gone. Look", "not_found", False),
        (SourceError("a: 503", "Wait", reason="server_error", transient=True), "a: 503. Wait", "server_error", True),
        (CorruptArchiveError("cut off", "Again", reason="truncated"), "cut off. Again", "truncated", False),
        (SettingsError("bad\nsetting", "Set it"), "bad setting. Set it", "failed", False),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), "No space left at /data/x. Check space", "disk", False),
        (OSError("plain"), "plain. Check space and permissions of the data root", "disk", False),
        (ValueError("odd\nvalue"), "ValueError: odd value. Report it with the run's log", "internal", False),
    ],
)  # fmt: skip
def test_every_error_becomes_one_line_of_the_archive(error: Exception, text: str, reason: str, transient: bool) -> None:
    with pytest.raises(ArchiveError) as caught, archive_errors("jdb", "train/000"):
        raise error
    assert str(caught.value).startswith(f"jdb train/000: {text}") and "\n" not in str(caught.value)
    assert (caught.value.dataset, caught.value.archive) == ("jdb", "train/000")
    assert (caught.value.reason, caught.value.transient) == (reason, transient)
    assert caught.value.__cause__ is error


def test_an_error_of_the_archive_stays_as_it_is() -> None:
    error = ArchiveError("jdb", "train/000", "no", "Do it", reason="stale", transient=True)
    with pytest.raises(ArchiveError) as caught, archive_errors("jdb", "train/000"):
        raise error
    assert caught.value is error


def test_the_traceback_of_a_defect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ArchiveError), archive_errors("jdb", "train/000"):
        raise ZeroDivisionError
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None and "jdb train/000" in record.getMessage()


def test_who_interrupts_is_obeyed(stage_dir: StageDir) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stage_dir, failing(KeyboardInterrupt()))
    assert published(stage_dir, "train/000") is None
    with workspace(stage_dir.ledger("train/000"), wait=False):  # given free
        pass


def test_a_data_root_that_cannot_be_used_is_an_error_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "jdb").write_text("a file where a directory must be")
    with pytest.raises(ArchiveError, match=r"jdb train/000: .*Check space and permissions") as caught:
        run(DataRoot(tmp_path).raw("jdb"))
    assert caught.value.reason == "disk"


def test_upstream_must_be_published_balanced_and_of_the_same_settings(stage_dir: StageDir) -> None:
    def refusal(settings: dict[str, Any]) -> tuple[str, str]:
        with pytest.raises(ArchiveError, match="Materialize jdb/raw of it") as caught:
            upstream_ledger(stage_dir, "train/000", settings)
        return caught.value.reason, caught.value.what

    assert refusal(SETTINGS) == ("upstream_missing", "jdb train/000: raw is not published")
    ledger = run(stage_dir).ledger
    assert upstream_ledger(stage_dir, "train/000", SETTINGS) == ledger
    assert refusal({"size": 2}) == ("stale", "jdb train/000: raw was made with other settings")
    stage_dir.ledger("train/000").write_text(replace(ledger, kept=3).to_json())
    assert refusal(SETTINGS)[0] == "unbalanced"


def test_versions_are_those_installed() -> None:
    assert versions_of("pillow") == {"md_assets": __version__, "pillow": importlib.metadata.version("pillow")}


def prune(stage_dir: StageDir) -> Ledger:
    """As `stages.prune` leaves an archive."""
    ledger = replace(run(stage_dir).ledger, pruned=Pruned("2026-11-22T10:00:00+00:00", 4))
    stage_dir.ledger("train/000").write_text(ledger.to_json())
    stage_dir.data("train/000").unlink()
    return ledger


def test_a_pruned_archive_is_recorded_but_not_published(stage_dir: StageDir) -> None:
    assert recorded(stage_dir, "train/000") is None
    ledger = run(stage_dir).ledger
    assert recorded(stage_dir, "train/000") == ledger
    refuse_pruned(stage_dir, "train/000")
    pruned = prune(stage_dir)
    assert recorded(stage_dir, "train/000") == upstream_ledger(stage_dir, "train/000", SETTINGS) == pruned
    assert published(stage_dir, "train/000") is None and current(stage_dir, "train/000", SETTINGS, INPUTS) is None
    with pytest.raises(ArchiveError) as caught:
        refuse_pruned(stage_dir, "train/000")
    assert str(caught.value) == (
        "jdb train/000: raw was pruned on 2026-11-22T10:00:00+00:00. Materialize jdb/raw of it again"
    )
    assert caught.value.reason == "pruned"


def test_a_pruned_archive_is_made_again(stage_dir: StageDir) -> None:
    prune(stage_dir)
    again = run(stage_dir)
    assert not again.passed_over and again.ledger.pruned is None
    assert published(stage_dir, "train/000") == again.ledger


def test_a_damaged_or_partly_missing_archive_is_not_recorded(stage_dir: StageDir) -> None:
    run(stage_dir)
    stage_dir.data("train/000").write_bytes(b"dat")
    assert recorded(stage_dir, "train/000") is None
    stage_dir.ledger("train/000").write_text("{")
    assert recorded(stage_dir, "train/000") is None


def test_what_was_found_damaged_is_withdrawn_and_made_again(stage_dir: StageDir) -> None:
    run(stage_dir)
    made_s = stage_dir.ledger("train/000").stat().st_mtime
    assert not withdraw(stage_dir, "train/000", made_s - 1)  # found before these data were made
    with workspace(stage_dir.ledger("train/000")):
        assert not withdraw(stage_dir, "train/000", made_s + 1)  # somebody makes it already
    assert published(stage_dir, "train/000") is not None

    assert withdraw(stage_dir, "train/000", made_s + 1)

    assert published(stage_dir, "train/000") is None
    assert not withdraw(stage_dir, "train/000", made_s + 1)
    assert not run(stage_dir).passed_over
