"""Archive files of the miniatures: what is written is what is read, and the same members give the same bytes."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md_assets.core.ledger import Reason
from md_assets.core.spec import ArchiveFormat
from md_assets.demo.containers import Entry, write_md5_beside, write_parquet, write_tar, write_tgz, write_zip
from md_assets.storage.archives import iter_members

MEMBERS: list[Entry] = [("a/1.jpg", b"one"), ("a/2.jpg", b""), ("link.jpg", None), ("../evil.jpg", b"evil")]

each_container = pytest.mark.parametrize(
    ("write", "archive_format"), [(write_tar, "tar"), (write_tgz, "tar"), (write_zip, "zip")]
)


@each_container
def test_members_are_read_back_and_what_leads_out_is_refused(
    tmp_path: Path, write: Callable[[Path, Iterable[Entry]], None], archive_format: ArchiveFormat
) -> None:
    write(tmp_path / "deep" / "archive", MEMBERS)
    members = list(iter_members(tmp_path / "deep" / "archive", archive_format, 100))
    assert [(m.name, m.data, m.refused) for m in members] == [
        ("a/1.jpg", b"one", None),
        ("a/2.jpg", b"", None),
        ("link.jpg", b"", Reason.UNSAFE_MEMBER),
        ("%2E%2E/evil.jpg", b"", Reason.UNSAFE_MEMBER),
    ]


@each_container
def test_the_same_members_give_the_same_bytes(
    tmp_path: Path, write: Callable[[Path, Iterable[Entry]], None], archive_format: ArchiveFormat
) -> None:
    for name in ("1", "2"):
        write(tmp_path / name, MEMBERS)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_table_has_several_row_groups_and_the_same_bytes(tmp_path: Path) -> None:
    schema = pa.schema({"name": pa.string(), "number": pa.uint16()})
    rows = [{"name": f"row {n}", "number": n} for n in range(10)]
    for name in ("1", "2"):
        write_parquet(tmp_path / name, rows, schema, row_group_size=4)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    table = pq.ParquetFile(tmp_path / "1")
    assert table.num_row_groups == 3 and table.schema_arrow.equals(schema)
    assert table.read().to_pylist() == rows


def test_an_md5_file_names_digest_and_file(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"hello")
    write_md5_beside(tmp_path / "a.zip")
    assert (tmp_path / "a.zip.md5").read_text() == "5d41402abc4b2a76b9719d911017c592  a.zip\n"
