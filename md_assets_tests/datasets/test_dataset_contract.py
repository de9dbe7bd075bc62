"""What every dataset must fulfil, whichever it is: IDs, addresses, splits, its datasheet."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from md_assets import datasets
from md_assets.core.errors import SettingsError
from md_assets.core.ledger import Reason
from md_assets.core.paths import checked_archive_id
from md_assets.core.spec import DatasetSpec, Member, Rejected, Sample
from md_assets.datasets import all_specs, spec_of

HEADINGS = ("Source", "License", "Archives", "Samples", "Captions", "Known defects")
SLUGS = ("jdb", "diffdb", "cc12m", "sa1b", "textcaps", "coco2014")
"""Of the contract; directories that training configs of the reference already name."""

SPECS = all_specs()
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.slug)


def test_there_are_datasets_and_each_is_found_by_its_slug() -> None:
    assert SPECS and all(spec_of(spec.slug) is spec for spec in SPECS)
    assert {spec.slug for spec in SPECS} <= set(SLUGS)


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


@each
def test_every_archive_has_an_address_of_its_own(spec: DatasetSpec) -> None:
    files = [spec.locate(archive) for archive in spec.archives]
    assert len(set(files)) == len(files)
    for file in files:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repo) and file.repo_type == "dataset"
        assert file.path and not file.path.startswith("/") and ".." not in file.path.split("/")


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
        assert source.columns and source.file.path
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


@each
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
def test_the_datasheet_names_the_repository_and_the_number_of_archives(spec: DatasetSpec) -> None:
    assert spec.locate(spec.archives[0]).repo in spec.datasheet
    assert spec.title and "\n" not in spec.title
