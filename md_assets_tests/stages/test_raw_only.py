"""What is only fetched: JSON lines as they are, images like any archive's."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import RawOnly
from md_assets.datasets.jdb import SPEC
from md_assets.demo.containers import write_tgz
from md_assets.stages import raw_only
from md_assets.stages.once import Outcome
from md_assets.stages.raw_only import BROKEN_LINES_NAMED, fetch_raw_only
from md_assets.stages.verify import counts_balance, file_intact
from md_assets.storage.image_pool import ImagePool
from md_assets_tests.stages.conftest import JourneyDb

(QUESTIONS,) = (extra for extra in SPEC.raw_only if not extra.images)
(IMAGES,) = (extra for extra in SPEC.raw_only if extra.images)
LINES = b'{"question": 1}\n{"question": "\xc3\xbc"}\n{"question": 3}\n'


def put(jdb: JourneyDb, extra: RawOnly, members: dict[str, bytes]) -> None:
    """Replace its file at the Hub."""
    write_tgz(jdb.repository / extra.file.path, list(members.items()))  # type: ignore[union-attr]


def fetch(jdb: JourneyDb, extra: RawOnly = QUESTIONS, **options: Any) -> Outcome:
    client = jdb.hub_client()
    return fetch_raw_only(
        SPEC,
        extra,
        lambda: client.locate(extra.file),  # type: ignore[arg-type]
        jdb.root,
        ImageSettings(),
        **{"fetcher": client, "pool": ImagePool(0), **options},
    )


def published(jdb: JourneyDb) -> bytes:
    return (jdb.root.path / "jdb" / "raw" / f"{QUESTIONS.name}.jsonl").read_bytes()


def test_lines_are_published_as_they_are_with_a_ledger(jdb: JourneyDb) -> None:
    put(jdb, QUESTIONS, {"questions.jsonl": LINES})
    ledger = fetch(jdb).ledger
    assert published(jdb) == LINES
    assert (ledger.read, ledger.kept, ledger.rejected, ledger.bytes_out) == (3, 3, {}, len(LINES))
    assert ledger.details == {"broken_lines": 0, "first_broken_lines": []}
    assert ledger.source["name"] == f"JourneyDB/JourneyDB:{QUESTIONS.file.path}"  # type: ignore[union-attr]
    assert (ledger.archive, ledger.stage) == (QUESTIONS.name, "raw") and ledger.bytes_in > 0
    assert json.loads((jdb.root.path / "jdb" / "raw" / f"{QUESTIONS.name}.json").read_text())["kept"] == 3
    raw = jdb.dir("raw")
    assert counts_balance(raw, QUESTIONS.name, None).passed and file_intact("x", raw, QUESTIONS.name).passed
    assert jdb.temporaries() == []


def test_broken_lines_are_counted_named_and_kept(jdb: JourneyDb) -> None:
    lines = b'{"a": 1}\n\n{"a": \n[1, 2]\n\xff\n   \n"text"\nlast line without an end'
    put(jdb, QUESTIONS, {"questions.jsonl": lines})
    ledger = fetch(jdb).ledger
    assert published(jdb) == lines
    assert (ledger.read, ledger.kept) == (6, 6) and ledger.balances
    assert ledger.details["broken_lines"] == 3
    named = ledger.details["first_broken_lines"]
    assert [line.partition(":")[0] for line in named] == ["line 3", "line 5", "line 8"]
    assert "JSONDecodeError" in named[0] and "UnicodeDecodeError" in named[1]


def test_only_the_first_broken_lines_are_named(jdb: JourneyDb) -> None:
    put(jdb, QUESTIONS, {"questions.jsonl": b"{\n" * 50})
    details = fetch(jdb).ledger.details
    assert details["broken_lines"] == 50 and len(details["first_broken_lines"]) == BROKEN_LINES_NAMED


def test_a_line_that_is_too_long_is_broken_and_copied_whole(jdb: JourneyDb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_only, "MAX_LINE_BYTES", 10)
    lines = b"[" + b"1," * 40 + b"1]\n[2]\n" + b"x" * 11 + b"\n" + b"9" * 10 + b"\n" + b"8" * 25
    put(jdb, QUESTIONS, {"questions.jsonl": lines})
    ledger = fetch(jdb).ledger
    assert published(jdb) == lines
    assert ledger.read == 5
    assert ledger.details["first_broken_lines"] == [f"line {n}: it has more than 10 bytes" for n in (1, 3, 4, 5)]


def test_done_once_and_again_when_the_source_changed(jdb: JourneyDb) -> None:
    put(jdb, QUESTIONS, {"questions.jsonl": LINES})
    first = fetch(jdb)
    assert fetch(jdb) == Outcome(first.ledger, passed_over=True)
    put(jdb, QUESTIONS, {"questions.jsonl": LINES + LINES})
    assert not fetch(jdb).passed_over and published(jdb) == LINES + LINES


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda jdb: put(jdb, QUESTIONS, {"a.jsonl": LINES, "b.jsonl": LINES}), "corrupt"),
        (lambda jdb: put(jdb, QUESTIONS, {}), "corrupt"),
        (lambda jdb: cut(jdb), "truncated"),
        (lambda jdb: (jdb.repository / QUESTIONS.file.path).unlink(), "not_found"),
    ],
    ids=["two files", "no file", "cut", "absent"],
)
def test_what_cannot_be_read_fails_and_leaves_what_was_there(
    jdb: JourneyDb, spoil: Callable[[JourneyDb], Any], reason: str
) -> None:
    put(jdb, QUESTIONS, {"questions.jsonl": LINES})
    fetch(jdb)
    spoil(jdb)
    with pytest.raises(ArchiveError, match=f"^jdb {QUESTIONS.name}: ") as caught:
        fetch(jdb)
    assert caught.value.reason == reason and published(jdb) == LINES


def cut(jdb: JourneyDb) -> None:
    path = jdb.repository / QUESTIONS.file.path  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:-12])


def test_images_are_kept_like_any_archives(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    put(jdb, IMAGES, {"./imgs/a.jpg": picture(1, 300, 300), "./imgs/b.jpg": picture(2, 900, 800), "./c.txt": b"no"})
    ledger = fetch(jdb, IMAGES, keep_archive=True).ledger
    assert (ledger.read, ledger.kept, ledger.rejected) == (3, 2, {"undecodable": ["test/imgs/c%2Etxt"]})
    samples = jdb.raw_samples(IMAGES.name)
    assert [sample.key for sample in samples] == ["test/imgs/a", "test/imgs/b"]
    assert [min(sample.width, sample.height) for sample in samples] == [300, 512]
    assert jdb.dir("raw").data(IMAGES.name) == jdb.root.path / "jdb/raw/test/imgs.tar"
    assert jdb.root.kept_archive("jdb", IMAGES.name, ".tgz").exists()
    assert fetch(jdb, IMAGES).passed_over
