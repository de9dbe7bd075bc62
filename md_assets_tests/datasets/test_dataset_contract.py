"""What every dataset must fulfil, whichever it is: IDs, addresses, splits, its datasheet."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from md_assets import datasets
from md_assets.core.errors import SettingsError
from md_assets.core.ledger import Reason
from md_assets.core.paths import checked_archive_id
from md_assets.core.source import Address, HubFile, WebFile
from md_assets.core.spec import DatasetSpec, Member, Rejected, Sample
from md_assets.datasets import all_specs, spec_of

HEADINGS = ("Source", "License", "Archives", "Samples", "Captions", "Known defects")
SLUGS = ("cc12m", "coco2014", "diffdb", "jdb", "sa1b", "textcaps")
"""Of the contract; directories that training configs of the reference already name."""

ARCHIVES = {
    "cc12m": (2_176, "cc12m-train-0000", "cc12m-train-2175"),
    "coco2014": (1, "val2014", "val2014"),
    "diffdb": (14_000, "part-000001", "part-014000"),
    "jdb": (400, "train/000", "valid/199"),
    "sa1b": (1_000, "sa_000000", "sa_000999"),
    "textcaps": (15, "train/00000", "val/00001"),
}
"""Number of archives, the first and the last; of the contract."""

SPECS = all_specs()
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.slug)


def test_there_are_six_datasets_and_each_is_found_by_its_slug() -> None:
    assert tuple(spec.slug for spec in SPECS) == SLUGS
    assert all(spec_of(spec.slug) is spec for spec in SPECS)


def test_a_dataset_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(SettingsError, match=r"no dataset 'laion'.*jdb"):
        spec_of("laion")


@pytest.mark.parametrize("content", ["", "SPEC = 5", "from md_assets.datasets.jdb import SPEC"])
def test_a_module_without_a_spec_of_its_own_is_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    folder = tmp_path_factory.mktemp("extra")
    name = f"extra_{folder.name}"
    (folder / f"{name}.py").write_text(content)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])
    with pytest.raises(SettingsError, match=f"{name}.py has no SPEC"):
        all_specs()


@each
def test_archives_are_those_of_the_contract(spec: DatasetSpec) -> None:
    assert (len(spec.archives), spec.archives[0], spec.archives[-1]) == ARCHIVES[spec.slug]


@each
def test_archive_ids_are_unique_relative_paths(spec: DatasetSpec) -> None:
    assert spec.archives and len(set(spec.archives)) == len(spec.archives)
    for archive in spec.archives:
        assert checked_archive_id(archive) == archive
        assert re.fullmatch(r"[A-Za-z0-9_/-]+", archive)


@each
def test_no_archives_directory_lies_in_anothers_nor_where_an_index_is(spec: DatasetSpec) -> None:
    """`<stage>/<archive>/` holds shards; `<stage>/index.json` or `<stage>/<split>/index.json` is the merged index."""
    folders = {archive.rpartition("/")[0] for archive in spec.archives}
    assert folders.isdisjoint(spec.archives)
    assert {f"{split}/index" for split in spec.splits or ("",)}.isdisjoint(spec.archives)
    assert "index" not in spec.archives


def addresses(spec: DatasetSpec) -> list[Address]:
    """Every file that the dataset is fetched from."""
    files = [spec.locate(archive) for archive in spec.archives]
    return [*files, *(source.file for source in spec.annotations), *(extra.file for extra in spec.raw_only)]


@each
def test_every_file_has_an_address_of_its_own(spec: DatasetSpec) -> None:
    files = addresses(spec)
    assert len(set(files)) == len(files)
    for file in files:
        if isinstance(file, HubFile):
            assert_is_in_a_repository(file)
        elif isinstance(file, WebFile):
            assert_is_relative(file.path)
            assert re.fullmatch(r"https?://[\w.]+", file.default_base)
            assert file.checksum is not None and re.fullmatch(r"[0-9a-f]{32}", file.checksum.hexdigest)
            assert re.fullmatch(r"MD_ASSETS_[A-Z0-9]+_URL", file.base_variable)
        else:
            assert_is_relative(file.name)
            assert_is_in_a_repository(file.mirror)
            assert re.fullmatch(r"MD_ASSETS_[A-Z0-9]+_LINKS", file.list_variable)


def assert_is_in_a_repository(file: HubFile) -> None:
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repo) and file.repo_type == "dataset"
    assert_is_relative(file.path)


def assert_is_relative(path: str) -> None:
    assert path and not path.startswith("/") and ".." not in path.split("/")


@each
def test_the_small_subset_is_part_of_the_whole(spec: DatasetSpec) -> None:
    assert spec.small and set(spec.small) <= set(spec.archives)
    assert list(spec.small) == sorted(set(spec.small), key=spec.archives.index)
    assert {spec.split_of(archive) for archive in spec.small} == {spec.split_of(a) for a in spec.archives}


@each
def test_splits_are_the_fronts_of_the_ids(spec: DatasetSpec) -> None:
    assert len(set(spec.splits)) == len(spec.splits)
    if spec.splits:
        assert list(dict.fromkeys(map(spec.split_of, spec.archives))) == list(spec.splits)
        assert all(archive.startswith(f"{spec.split_of(archive)}/") for archive in spec.archives)


@each
def test_captions_outside_the_archives_cover_all_of_them(spec: DatasetSpec) -> None:
    names = [source.name for source in spec.annotations]
    assert len(set(names)) == len(names) and all(checked_archive_id(name) == name for name in names)
    if spec.annotations:
        assert {spec.annotation_of(archive) for archive in spec.archives} == set(spec.annotations)
    for source in spec.annotations:
        assert source.columns
        with pytest.raises((KeyError, TypeError, ValueError)):
            source.parse({})


@each
def test_a_refused_member_is_rejected_for_its_reason_and_keys_are_below_the_archive(spec: DatasetSpec) -> None:
    archive = spec.archives[0]

    def members() -> Iterator[Member]:
        yield Member("a.jpg", b"", Reason.TOO_LARGE)
        yield Member("%2E%2E/evil.jpg", b"", Reason.UNSAFE_MEMBER)

    samples = list(spec.read_samples(archive, members()))
    assert all(isinstance(sample, Rejected) for sample in samples)
    assert [sample.reason for sample in samples if isinstance(sample, Rejected)] == ["too_large", "unsafe_member"]
    assert all(sample.key.startswith(f"{archive}/") for sample in samples)


@pytest.mark.parametrize("spec", [s for s in SPECS if len(s.archives) > 1], ids=lambda spec: spec.slug)
def test_samples_of_two_archives_never_share_a_key(spec: DatasetSpec) -> None:
    one, other = spec.archives[:2]
    keys = [
        {s.key for s in spec.read_samples(archive, iter([Member("x.jpg", b"1")])) if isinstance(s, Sample)}
        for archive in (one, other)
    ]
    assert keys[0].isdisjoint(keys[1])


@each
def test_the_datasheet_has_the_fixed_headings_in_order(spec: DatasetSpec) -> None:
    assert tuple(re.findall(r"^\*\*(.+?)\*\* ·", spec.datasheet, re.MULTILINE)) == HEADINGS
    paragraphs = spec.datasheet.strip().split("\n\n")
    assert paragraphs[0].startswith(f"{spec.title}: ") and len(paragraphs) == 1 + len(HEADINGS)
    assert all(len(paragraph.partition("·")[2].split()) > 3 for paragraph in paragraphs[1:])


@each
def test_the_datasheet_names_every_place_that_files_come_from(spec: DatasetSpec) -> None:
    for file in addresses(spec):
        if isinstance(file, HubFile):
            assert f"`{file.repo}`" in spec.datasheet
        elif isinstance(file, WebFile):
            assert file.default_base in spec.datasheet and file.base_variable in spec.datasheet
        else:
            assert f"`{file.mirror.repo}`" in spec.datasheet and file.list_variable in spec.datasheet
    assert spec.title and "\n" not in spec.title


@each
def test_a_parquet_archive_says_how_samples_lie_in_it_and_no_other_does(spec: DatasetSpec) -> None:
    assert (spec.parquet is not None) == (spec.archive_format == "parquet")


@each
def test_rows_that_do_not_tell_their_archive_have_numbers_and_no_others(spec: DatasetSpec) -> None:
    """Captions and samples must then agree on the number."""
    for source in spec.annotations:
        assert (source.number_of is not None) == (source.format == "texts")
        if source.number_of is not None:
            caption = source.parse({"name": "sa_12.txt", "text": "x"})
            samples = spec.read_samples(spec.archives[0], iter([Member("sa_12.jpg", b"1")]))
            assert caption.archive == ""
            assert [source.number_of(sample.key) for sample in samples] == [source.number_of(caption.key)] == [12]


@each
def test_what_is_only_fetched_and_subsets_have_names_of_their_own(spec: DatasetSpec) -> None:
    names = [extra.name for extra in spec.raw_only]
    assert len(set(names)) == len(names) and set(names).isdisjoint(spec.archives)
    assert all(checked_archive_id(name) == name for name in names)
    assert len({subset.name for subset in spec.subsets}) == len(spec.subsets)
    assert all(re.fullmatch(r"[a-z0-9]+", subset.name) and subset.min_edge_px > 256 for subset in spec.subsets)
