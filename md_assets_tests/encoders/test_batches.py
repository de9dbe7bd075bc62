"""Batches: every row once and in order, archives taken no earlier than needed, and nothing lost in silence."""

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from md_assets.core.errors import MdAssetsError
from md_assets.core.paths import DataRoot
from md_assets.encoders.batches import (
    Batch,
    Preparation,
    PreparedBatches,
    RowAddress,
    Unreadable,
    UnreadableRowError,
    batches,
    crops_of,
)
from md_assets.encoders.text import Tokens
from md_assets.encoders.vae import posterior_noise
from md_assets.storage.mds import Shard, ShardReader, read_index


def tokenize(captions) -> Tokens:
    """The lengths of the captions, as tokens of the right form."""
    ids_BL = torch.tensor([[len(caption)] for caption in captions])
    return Tokens(ids_BL, torch.ones(len(captions), dtype=torch.int64))


PREPARATION = Preparation(tokenize, (16, 32), seed=0, noise_channels=4)


@dataclass
class Held:
    """An archive as `batches` wants it."""

    archive: str
    shards: tuple[Shard, ...]
    failed: bool = False


@pytest.fixture
def archive(tmp_path: Path, mds_rows, publish_mds) -> Callable[..., Held]:
    """A function (id, count) that publishes an archive and gives it as one that is held."""

    def make(archive_id: str, count: int, change: Callable[[list], None] = lambda rows: None) -> Held:
        root = DataRoot(tmp_path)
        rows = mds_rows(archive_id, count, 48, 40)
        change(rows)
        publish_mds(root, "jdb", archive_id, rows)
        return Held(archive_id, read_index(root.mds("jdb").data(archive_id)))

    return make


def shape(batch: Batch | Unreadable) -> tuple[str, int]:
    assert isinstance(batch, Batch)
    return batch.archive, len(batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_comes_once_in_order_and_archives_are_not_mixed(archive, mds_rows, num_workers: int) -> None:
    held = [archive("train/000", 7), archive("train/001", 0), archive("train/002", 4)]
    got = list(batches(iter(held), PREPARATION, 3, num_workers, False))
    assert [shape(b)[0] for b in got] == ["train/000"] * 3 + ["train/002"] * 2
    assert [shape(b)[1] for b in got] == [3, 3, 1, 3, 1]
    expected = mds_rows("train/000", 7, 48, 40) + mds_rows("train/002", 4, 48, 40)
    for column in ("key", "caption", "width", "height", "jpg"):
        assert [value for b in got for value in getattr(b, column)] == [row[column] for row in expected]
    assert torch.cat([b.tokens.ids_BL for b in got]).tolist() == [[len(row["caption"])] for row in expected]
    for px in (16, 32):
        images = torch.cat([b.images_BCHW[px] for b in got])
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.stack([crops_of("", row["jpg"], [px])[px] for row in expected]))
        noise = torch.cat([b.noise_BChw[px] for b in got])
        assert torch.equal(noise, torch.stack([posterior_noise(0, row["key"], px, 4) for row in expected]))


@pytest.mark.parametrize(("num_workers", "at_the_first_batch"), [(0, ["a"]), (1, ["a", "b"])])
def test_an_archive_is_taken_when_prefetching_reaches_it(archive, num_workers: int, at_the_first_batch) -> None:
    held = [archive("a", 4), archive("b", 9), archive("c", 1)]
    taken: list[str] = []

    def take() -> Iterator[Held]:
        for one in held:
            taken.append(one.archive)
            yield one

    stream = batches(take(), PREPARATION, 2, num_workers, False)
    next(stream)
    assert taken == at_the_first_batch
    assert len(list(stream)) == 7
    assert taken == ["a", "b", "c"]


def test_a_failed_archive_gives_no_more_batches(archive) -> None:
    first, second = archive("a", 50), archive("b", 2)
    stream = batches(iter([first, second]), PREPARATION, 1, 1, False)
    next(stream)
    first.failed = True
    rest = [shape(batch)[0] for batch in stream]
    assert rest[-2:] == ["b", "b"]
    assert len(rest) <= 2 + 2  # those that were on their way


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_and_the_others_come(archive, num_workers: int) -> None:
    def damage(rows: list) -> None:
        rows[4]["jpg"] = rows[4]["jpg"][: len(rows[4]["jpg"]) // 2]

    held = [archive("a", 6, damage), archive("b", 2)]
    got = list(batches(iter(held), PREPARATION, 2, num_workers, False))
    whole, _, half, _ = got
    assert [shape(one) for one in got] == [("a", 2)] * 3 + [("b", 2)]
    assert isinstance(whole, Batch) and isinstance(half, Batch)
    assert whole.faults == ["", ""]
    assert "the image of sample a/0004 cannot be decoded (image file is truncated" in half.faults[0]
    assert half.faults[1] == ""
    for px in (16, 32):  # the other one is where and what it was
        assert torch.equal(half.images_BCHW[px][1], crops_of("", half.jpg[1], [px])[px])
        assert not half.images_BCHW[px][0].any()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_the_disk_spoiled_is_told_from_one_that_never_was(archive, num_workers: int) -> None:
    held = archive("a", 6)
    path = held.shards[0].path
    data = bytearray(path.read_bytes())
    picture = ShardReader(held.shards[0])[4]["jpg"]
    at = data.index(picture)
    data[at : at + len(picture) // 2] = bytes(len(picture) // 2)
    path.write_bytes(data)
    got = list(batches(iter([held]), PREPARATION, 2, num_workers, False))
    assert [type(one) for one in got] == [Batch, Batch, Unreadable]
    assert "the image of sample a/0004 cannot be decoded" in got[2].what
    assert f"{path} does not hash to what its index says" in got[2].what


def test_a_damaged_shard_is_named(archive) -> None:
    held = archive("a", 3)
    shard = held.shards[0].path
    shard.write_bytes(shard.read_bytes()[:-1])
    (got,) = batches(iter([held]), PREPARATION, 8, 0, False)
    assert isinstance(got, Unreadable)
    assert str(shard) in got.what


def test_noise_is_drawn_only_where_it_is_wanted(archive) -> None:
    (batch,) = batches(iter([archive("a", 2)]), replace(PREPARATION, noise_channels=0), 8, 0, False)
    assert isinstance(batch, Batch)
    assert batch.noise_BChw == {}


def test_rows_of_several_shards(archive) -> None:
    first, second = archive("a", 2).shards + archive("b", 2).shards
    batch = PreparedBatches(PREPARATION)[
        [RowAddress("x", first, 1), RowAddress("x", second, 0), RowAddress("x", first, 0)]
    ]
    assert isinstance(batch, Batch)
    assert batch.key == ["a/0001", "b/0000", "a/0000"]


def test_a_killed_worker_is_an_error(archive) -> None:
    def die(captions) -> Tokens:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    with pytest.raises(MdAssetsError, match=r"prepares batches was killed.*/dev/shm"):
        list(batches(iter([archive("a", 4)]), replace(PREPARATION, tokenize=die), 2, 1, False))


def test_workers_do_not_inherit_what_locks_an_archive(archive, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.mkdir()

    def take() -> Iterator[Held]:
        descriptor = os.open(lock, os.O_RDONLY)
        try:
            yield archive("a", 6)
        finally:
            os.close(descriptor)

    stream = batches(take(), PREPARATION, 2, 2, False)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        opened = [str(link.readlink()) for link in Path(f"/proc/{worker.pid}/fd").iterdir() if link.is_symlink()]
        assert opened
        assert str(lock) not in opened


def test_giving_up_ends_the_workers(archive) -> None:
    stream = batches(iter([archive("a", 20)]), PREPARATION, 1, 2, False)
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert multiprocessing.active_children() == []


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 90), (64, 64), (301, 40), (33, 1000)])
def test_crops_are_the_reference_transforms(width: int, height: int, mds_rows) -> None:
    """torchvision's Resize and CenterCrop of PIL images, as the reference codebase composes them."""
    data = mds_rows("a", 1, width, height)[0]["jpg"]
    crops = crops_of("k", data, (32, 64))
    for px in (32, 64):
        expected = CenterCrop(px)(Resize(px, interpolation=InterpolationMode.BICUBIC)(Image.open(io.BytesIO(data))))
        difference = crops[px].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
        assert crops[px].shape == (3, px, px)
        assert np.abs(difference).max() <= 2
        assert np.abs(difference).mean() < 0.2


def test_a_grey_image_has_three_equal_channels() -> None:
    crop = crops_of("k", jpeg(Image.linear_gradient("L")), [32])[32]
    assert crop.shape == (3, 32, 32)
    assert torch.equal(crop[0], crop[1])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(UnreadableRowError, match="the image of sample some/key cannot be decoded"):
        crops_of("some/key", data, [32])
