"""The incomplete file: what is taken over from an earlier process, its lock, its checks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from md_assets.core.errors import SourceError
from md_assets.core.source import RemoteFile
from md_assets.storage.part_file import Digest, MismatchError, PartFile, verified_size

CONTENT = bytes(range(256)) * 20
SHA256 = Digest("sha256", hashlib.sha256(CONTENT).hexdigest())


def remote(content_id: str = "v1", size_bytes: int | None = len(CONTENT)) -> RemoteFile:
    return RemoteFile("a.tar", "http://127.0.0.1/a.tar", size_bytes, None, content_id, "")


def begin(path: Path, content_id: str = "v1", etag: str = '"e"') -> None:
    with PartFile(remote(content_id), path, None) as part:
        part.note_source(etag)
        part.append(CONTENT[:100])


def test_goes_on_from_what_is_there_and_verifies_the_whole(tmp_path: Path) -> None:
    begin(tmp_path / "a.tar")
    with PartFile(remote(), tmp_path / "a.tar", SHA256) as part:
        assert part.size_bytes == 100 and part.etag == '"e"'
        part.append(CONTENT[100:])
        part.verify()
        assert not (tmp_path / "a.tar").exists()
        part.publish()
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("left_content_id", "digest", "size_bytes", "taken_over"),
    [
        ("v1", None, len(CONTENT), True),
        ("v2", None, len(CONTENT), False),
        ("v2", SHA256, len(CONTENT), False),
        ("v1", None, 99, False),
        (None, None, len(CONTENT), False),
        (None, SHA256, len(CONTENT), True),
    ],
)
def test_takes_over_only_the_beginning_of_the_same_content(
    tmp_path: Path, left_content_id: str | None, digest: Digest | None, size_bytes: int, taken_over: bool
) -> None:
    begin(tmp_path / "a.tar", left_content_id or "v1")
    if left_content_id is None:
        (tmp_path / "a.tar.source.part").unlink()
    with PartFile(remote("v1", size_bytes), tmp_path / "a.tar", digest) as part:
        assert part.size_bytes == (100 if taken_over else 0)
        assert part.path.stat().st_size == part.size_bytes


def test_one_destination_has_one_writer(tmp_path: Path) -> None:
    with PartFile(remote(), tmp_path / "a.tar", None) as part:
        with (
            pytest.raises(SourceError, match="another process is fetching it") as caught,
            PartFile(remote(), tmp_path / "a.tar", None),
        ):
            pytest.fail("both have it")
        assert caught.value.reason == "busy" and caught.value.transient
        part.append(CONTENT)
    with PartFile(remote(), tmp_path / "a.tar", SHA256) as part:
        assert part.size_bytes == len(CONTENT)


def test_wrong_size_and_wrong_digest_are_told_apart(tmp_path: Path) -> None:
    with PartFile(remote(), tmp_path / "a.tar", SHA256) as part:
        part.append(CONTENT[:-1])
        with pytest.raises(MismatchError) as caught:
            part.verify()
        assert caught.value.reason == "size_mismatch"
        part.append(b"!")
        with pytest.raises(MismatchError) as caught:
            part.verify()
        assert caught.value.reason == "checksum_mismatch" and SHA256.hexdigest in str(caught.value)
        part.clear()
        part.append(CONTENT)
        part.verify()


def test_git_blob_digest(tmp_path: Path) -> None:
    # printf 'hi' | git hash-object --stdin
    digest = Digest("sha1", "32f95c0d1244a78b2be1bab8de17906fabb2c4a8", prefix=b"blob 2\0")
    (tmp_path / "f").write_bytes(b"hi")
    assert verified_size(tmp_path / "f", remote(size_bytes=2), digest) == 2
    (tmp_path / "f").write_bytes(b"ho")
    assert verified_size(tmp_path / "f", remote(size_bytes=2), digest) is None
    assert verified_size(tmp_path / "missing", remote(size_bytes=2), digest) is None


def test_full_disk_is_told_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").symlink_to("/dev/full")
    with (
        PartFile(remote(), tmp_path / "a.tar", None) as part,
        pytest.raises(SourceError, match=f"too little space is left in {tmp_path}.*MD_ASSETS_DATA") as caught,
    ):
        part.append(CONTENT)
    assert caught.value.reason == "disk_full" and not caught.value.transient
