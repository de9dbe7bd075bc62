"""All miniature sources: every kind of reject as often as it says, captions as they must come out, the same bytes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings
from md_assets.core.source import Address, HubFile, LinkedFile
from md_assets.core.spec import OrphanCaption, Rejected
from md_assets.datasets import all_specs, spec_of
from md_assets.demo import mscoco, segment_anything
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import CUT_AT, TOO_SMALL_AT, Miniature, pictures, written_once
from md_assets.demo.sandbox import MINIATURES
from md_assets.storage.archives import iter_members
from md_assets.storage.images import StoredImage, prepare_image

SIZE_PX = 300

each = pytest.mark.parametrize("miniature", MINIATURES.values(), ids=lambda miniature: miniature.slug)
each_archive = pytest.mark.parametrize(
    ("miniature", "archive"), [(m, archive) for m in MINIATURES.values() for archive in m.archives]
)


def write(miniature: Miniature, root: Path, size_px: int = SIZE_PX) -> None:
    miniature.write(root / "hub", root / "web", miniature.samples, size_px)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hub` and `web`, in which all miniatures are written."""
    root = tmp_path_factory.mktemp("miniatures")
    for miniature in MINIATURES.values():
        write(miniature, root)
    return root


def file_of(root: Path, address: Address) -> Path:
    """Where a miniature's servers have a file."""
    if isinstance(address, HubFile):
        (file,) = (root / "hub" / "datasets" / address.repo).glob(address.path)
        return file
    if isinstance(address, LinkedFile):
        return root / "web" / segment_anything.WEB_FOLDER / address.name
    return root / "web" / mscoco.WEB_FOLDER / address.path


def judged(miniature: Miniature, archive: str, root: Path) -> Iterator[tuple[str, str]]:
    """Key and verdict (`kept` or the reason) of each sample, as raw would judge it."""
    spec, settings = spec_of(miniature.slug), ImageSettings()
    members = iter_members(
        file_of(root, spec.locate(archive)), spec.archive_format, settings.max_member_bytes, parquet=spec.parquet
    )
    seen: set[str] = set()
    for sample in spec.read_samples(archive, members):
        if isinstance(sample, OrphanCaption):
            continue
        if sample.key in seen:
            yield sample.key, Reason.DUPLICATE_KEY
        elif isinstance(sample, Rejected):
            yield sample.key, sample.reason
        else:
            prepared = prepare_image(sample.image, settings)
            yield sample.key, "kept" if isinstance(prepared, StoredImage) else prepared
        seen.add(sample.key)


def test_there_is_one_of_every_dataset() -> None:
    assert sorted(MINIATURES) == [spec.slug for spec in all_specs()]


def test_no_two_have_archives_of_one_name() -> None:
    archives = [archive for miniature in MINIATURES.values() for archive in miniature.archives]
    assert len(set(archives)) == len(archives)


@each
def test_archives_are_upstreams_and_all_but_journeydbs_are_neighbours(miniature: Miniature) -> None:
    """So that the demo materializes them as one range."""
    archives = spec_of(miniature.slug).archives
    positions = [archives.index(archive) for archive in miniature.archives]
    assert miniature.slug == "jdb" or positions == list(range(positions[0], positions[0] + len(positions)))


@each_archive
def test_every_archive_holds_every_kind_of_reject_as_often_as_said(
    miniature: Miniature, archive: str, roots: Path
) -> None:
    verdicts = list(judged(miniature, archive, roots))
    reasons = Counter(reason for _, reason in verdicts)
    assert sum(reasons.values()) == miniature.samples
    kept = reasons.pop("kept")
    assert reasons == miniature.rejected_by_raw
    captions = miniature.content(archive, miniature.samples, SIZE_PX).kept
    assert len(captions) == kept - sum(miniature.rejected_by_mds.values()) == miniature.samples - miniature.lost
    order = [key for key, reason in verdicts if reason == "kept"]
    assert [key for key in order if key in captions] == list(captions)
    assert all(caption.strip() for caption in captions.values())


@each
def test_files_lie_where_the_real_sources_have_them(miniature: Miniature, roots: Path) -> None:
    spec = spec_of(miniature.slug)
    addresses = [spec.locate(archive) for archive in miniature.archives]
    addresses += [source.file for source in spec.annotations] + [extra.file for extra in spec.raw_only]
    assert all(file_of(roots, address).is_file() for address in addresses)


def contents(root: Path) -> Mapping[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@each
def test_the_same_arguments_give_the_same_bytes(miniature: Miniature, tmp_path: Path) -> None:
    for name in ("1", "2"):
        miniature.write(tmp_path / name / "hub", tmp_path / name / "web", miniature.samples, 64)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") != {}


@each
def test_what_is_there_is_not_written_again(miniature: Miniature, roots: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in roots.rglob("*")}
    write(miniature, roots, 64)
    assert {path: path.stat().st_mtime_ns for path in roots.rglob("*")} == before


def test_an_interrupted_writing_is_done_again(tmp_path: Path) -> None:
    (tmp_path / ".folder.new").mkdir()
    (tmp_path / ".folder.new" / "half").write_text("of something else")
    written_once(tmp_path / "folder", lambda folder: (folder / "file").write_text("whole") and None)
    assert contents(tmp_path) == {"folder/file": b"whole"}


def test_pictures_differ_by_archive_and_position_and_have_their_faults() -> None:
    made = {archive: list(pictures(archive, 10, 320, {8: (400, 350)})) for archive in ("a", "b")}
    assert len({picture.identity for archive in made.values() for picture in archive}) == 20
    for archive in made.values():
        sizes = [picture.drawing.image.size for picture in archive]
        small = (300, 200)
        assert sizes == [(320, 320)] * 3 + [small, small] + [(320, 320)] * 3 + [(400, 350), (480, 320)]
        assert [p.position for p in archive if not p.usable] == [*TOO_SMALL_AT, CUT_AT]
        whole = archive[CUT_AT].drawing.jpeg()
        assert archive[CUT_AT].file(Drawing.jpeg) == whole[: len(whole) // 2]
        assert archive[0].file(Drawing.jpeg) == archive[0].drawing.jpeg()
