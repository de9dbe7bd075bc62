"""The miniature Segment-Anything-1B: its link list and its tar of captions."""

from pathlib import Path

from md_assets.demo.segment_anything import ABSENT, ARCHIVES, FIRST_NUMBER, LISTED, MINIATURE
from md_assets.storage.archives import iter_members


def test_the_link_list_has_all_archives_in_another_order_and_rows_that_are_none() -> None:
    tars = [f"{archive}.tar" for archive in ARCHIVES]
    assert set(LISTED) == {*tars, "sa_images_ids.txt", "sa_co_gold.tar"}
    assert [name for name in LISTED if name in tars] == tars[::-1]


def test_captions_are_one_tar_of_all_archives_with_a_file_that_is_none(tmp_path: Path) -> None:
    MINIATURE.write(tmp_path / "hub", tmp_path / "web", MINIATURE.samples, 64)
    path = tmp_path / "hub/datasets/PixArt-alpha/SAM-LLaVA-Captions10M/SA1B_caption.tar.gz"
    names = [member.name for member in iter_members(path, "tar", 1000)]
    # Of 14 pictures one has no caption, and one caption has no picture.
    assert names[0] == "README.txt" and len(names) == 1 + 2 * 14
    numbers = [int(name.removeprefix("sa_").removesuffix(".txt")) for name in names[1:]]
    assert numbers[:14] == [n for n in (*range(1001, 1009), *range(1010, 1016), 1009) if n != 1007]
    assert FIRST_NUMBER["sa_000001"] + ABSENT == 1009


def test_every_image_has_masks_beside_it() -> None:
    names = [name for name, data in MINIATURE.content(ARCHIVES[0], MINIATURE.samples, 64).members if data]
    images = {name.removesuffix(".jpg") for name in names if name.endswith(".jpg")}
    assert images == {name.removesuffix(".json") for name in names if name.endswith(".json")}
    assert len(images) == 14
