"""The miniature MS-COCO 2014: both zips, with their digests beside them."""

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from md_assets.demo.mscoco import FURTHER_CAPTIONS, MINIATURE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    MINIATURE.write(root / "hub", root, MINIATURE.samples, 64)
    return root / "coco"


@pytest.mark.parametrize("path", ["zips/val2014.zip", "annotations/annotations_trainval2014.zip"])
def test_both_zips_lie_where_the_server_has_them_with_their_md5(folder: Path, path: str) -> None:
    digest = hashlib.md5((folder / path).read_bytes()).hexdigest()
    assert (folder / f"{path}.md5").read_text().split() == [digest, Path(path).name]


def test_annotations_name_images_by_number_and_have_several_captions_each(folder: Path) -> None:
    with zipfile.ZipFile(folder / "annotations/annotations_trainval2014.zip") as annotations:
        assert len(annotations.namelist()) == 3
        body = json.loads(annotations.read("annotations/captions_val2014.json"))
    captions = Counter(annotation["image_id"] for annotation in body["annotations"])
    assert set(captions) == {image["id"] for image in body["images"]}
    assert captions.pop(7) == 1  # its image is absent
    assert set(captions.values()) == {1 + FURTHER_CAPTIONS} and len(captions) == MINIATURE.samples - 2 - 1


def test_the_images_lie_in_a_folder_of_the_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "zips/val2014.zip") as images:
        names = images.namelist()
    assert names[:2] == ["val2014/", "val2014/COCO_val2014_000000000042.jpg"] and names[-1] == "../evil.jpg"
