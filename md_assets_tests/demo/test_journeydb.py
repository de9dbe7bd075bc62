"""The miniature JourneyDB: the real layout, every kind of reject as often as it says, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import Sample
from md_assets.datasets.jdb import REPO, SPEC
from md_assets.demo.journeydb import (
    ARCHIVES,
    REJECTED_BY_MDS,
    REJECTED_BY_RAW,
    SAMPLES_PER_ARCHIVE,
    TEST_IMAGES,
    miniature_archive,
    write_annotations,
    write_miniature_journeydb,
)
from md_assets.storage.archives import iter_members, open_single_file
from md_assets.storage.images import StoredImage, prepare_image

SAMPLES, SIZE_PX = 12, 300


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_miniature_journeydb(tmp_path_factory.mktemp("hub"), ARCHIVES, SAMPLES, SIZE_PX)


def samples(repository: Path, archive: str) -> dict[str, str]:
    """Key -> `kept` or the reason, as raw would judge; a later duplicate under its key with a `+`."""
    path = repository / SPEC.locate(archive).path
    found: dict[str, str] = {}
    for sample in SPEC.read_samples(archive, iter_members(path, "tar", 2**28)):
        if isinstance(sample, Sample):
            result = prepare_image(sample.image, ImageSettings())
            judged = "kept" if isinstance(result, StoredImage) else result
        else:
            judged = sample.reason
        if sample.key in found:
            found[f"{sample.key}+"] = Reason.DUPLICATE_KEY
        else:
            found[sample.key] = judged
    return found


def captions(repository: Path, split: str) -> dict[str, str]:
    source = SPEC.annotation_of(f"{split}/000")
    assert source is not None
    with open_single_file(repository / source.file.path) as lines:
        return {caption.key: caption.text for caption in (source.parse(json.loads(line)) for line in lines)}


def test_files_lie_where_the_real_repository_has_them(repository: Path) -> None:
    assert repository.parts[-3:] == ("datasets", *REPO.split("/"))
    files = sorted(p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file())
    expected = [SPEC.locate(archive).path for archive in ARCHIVES] + [source.file.path for source in SPEC.annotations]
    expected += [extra.file.path for extra in SPEC.raw_only]
    assert files == sorted(expected)
    assert set(ARCHIVES) <= set(SPEC.archives)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_every_archive_holds_every_kind_of_reject_as_often_as_said(repository: Path, archive: str) -> None:
    judged = samples(repository, archive)
    assert len(judged) == SAMPLES
    reasons = list(judged.values())
    assert {reason: reasons.count(reason) for reason in set(reasons) - {"kept"}} == dict(REJECTED_BY_RAW)
    texts = captions(repository, archive.partition("/")[0])
    without = [key for key, reason in judged.items() if reason == "kept" and not texts.get(key, "").strip()]
    assert len(without) == REJECTED_BY_MDS[Reason.NO_CAPTION]


@pytest.mark.parametrize("split", SPEC.splits)
def test_captions_match_their_images_but_for_one_orphan_an_archive(repository: Path, split: str) -> None:
    archives = [archive for archive in ARCHIVES if SPEC.split_of(archive) == split]
    keys = {key for archive in archives for key in samples(repository, archive)}
    texts = captions(repository, split)
    assert len(set(texts) - keys) == len(archives)
    assert all(text for text in texts.values())


def test_the_demos_own_size_balances_too() -> None:
    for archive in ARCHIVES:
        content = miniature_archive(archive, SAMPLES_PER_ARCHIVE, 64)
        assert len(content.members) == SAMPLES_PER_ARCHIVE


def test_archives_differ_and_each_is_always_the_same() -> None:
    contents = {archive: miniature_archive(archive, 10, 64) for archive in ARCHIVES}
    assert contents == {archive: miniature_archive(archive, 10, 64) for archive in ARCHIVES}
    names = [{name for name, data in content.members if data} for content in contents.values()]
    assert len(set.union(*names)) == sum(map(len, names))


def test_the_same_arguments_give_the_same_bytes_and_nothing_is_written_twice(tmp_path: Path, repository: Path) -> None:
    again = write_miniature_journeydb(tmp_path, ARCHIVES, SAMPLES, SIZE_PX)
    for path in repository.rglob("*.tgz"):
        assert (again / path.relative_to(repository)).read_bytes() == path.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert write_miniature_journeydb(tmp_path, ARCHIVES[:1], 10, 64) == again
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before
    assert [p.name for p in again.parent.iterdir()] == [again.name]


def test_an_interrupted_writing_is_done_again(tmp_path: Path) -> None:
    unfinished = tmp_path / "datasets" / "JourneyDB" / ".JourneyDB.new" / "data" / "train" / "imgs"
    unfinished.mkdir(parents=True)
    (unfinished / "199.tgz").write_bytes(b"half")
    repository = write_miniature_journeydb(tmp_path, ARCHIVES[:1], 10, 64)
    assert not list(repository.rglob("199.tgz")) and not unfinished.exists()


def test_annotations_are_one_file_of_json_lines(tmp_path: Path) -> None:
    file = SPEC.annotations[0].file
    write_annotations(tmp_path, file, {"./000/a.jpg": "猫\n", "./000/b.jpg": ""})
    with open_single_file(tmp_path / file.path) as lines:
        rows = [json.loads(line) for line in lines]
    assert rows == [{"img_path": "./000/a.jpg", "prompt": "猫\n"}, {"img_path": "./000/b.jpg", "prompt": ""}]


def test_the_test_split_has_a_question_on_each_image(repository: Path) -> None:
    questions, images = (repository / extra.file.path for extra in SPEC.raw_only)
    names = [member.name for member in iter_members(images, "tar", 2**28)]
    with open_single_file(questions) as lines:
        asked = [json.loads(line)["img_path"].removeprefix("./") for line in lines]
    assert names == asked and len(names) == TEST_IMAGES
