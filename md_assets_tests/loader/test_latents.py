from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import Stream, StreamingDataset

from md_assets.core.errors import SettingsError
from md_assets.loader import LatentsLayout, LatentsStream, build_latents_dataloader
from md_assets.stages.index import merge_indexes
from md_assets.stages.latents import encode_archives
from md_assets.storage.mds import ShardError
from md_assets_tests.loader.made_latents import CAPTION, IMAGES, array_of, make_latents, metadata, write_ledger

REAL_SHAPES: dict[str, Any] = {"caption": (1, 7, 16), "images": {256: (4, 32, 32), 512: (4, 64, 64)}}


def keys_of(loader: Any) -> list[str]:
    return [key for batch in loader for key in batch["key"]]


def masks_of(loader: Any) -> dict[str, float]:
    return {
        key: mask
        for batch in loader
        for key, mask in zip(batch["key"], batch["drop_caption_mask"].tolist(), strict=True)
    }


def reference_rows(directory: Path, image_size: int) -> list[dict[str, torch.Tensor]]:
    """What the reference's training loader makes of a directory: fixed float16, shapes given by its user."""
    tokens, width = REAL_SHAPES["caption"][1:]

    def decoded(row: dict[str, Any]) -> dict[str, torch.Tensor]:
        caption = torch.from_numpy(np.frombuffer(row["caption_latents"], dtype=np.float16).copy())
        image = torch.from_numpy(np.frombuffer(row[f"latents_{image_size}"], dtype=np.float16).copy())
        return {
            "caption_latents": caption.reshape(1, tokens, width),
            "image_latents": image.reshape(-1, image_size // 8, image_size // 8),
        }

    dataset = StreamingDataset(streams=[Stream(remote=None, local=str(directory))], shuffle=False, batch_size=2)
    return [decoded(row) for row in dataset]


@pytest.mark.parametrize("image_size", [256, 512])
def test_batches_equal_those_of_the_reference_loader(tmp_path: Path, image_size: int) -> None:
    directory = make_latents(tmp_path, "jdb", (3, 2), **REAL_SHAPES)
    loader = build_latents_dataloader(
        directory, batch_size=2, image_size=image_size, shuffle=False, drop_last=False, num_workers=0
    )
    batches = list(loader)
    assert [len(batch["image_latents"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["image_latents"].shape == (2, *REAL_SHAPES["images"][image_size])
    assert batches[0]["caption_latents"].shape == (2, *REAL_SHAPES["caption"])
    reference = reference_rows(directory, image_size)
    assert len(reference) == 5
    for column in ("image_latents", "caption_latents"):
        ours = torch.cat([batch[column] for batch in batches])
        assert ours.dtype == torch.float16
        assert torch.equal(ours, torch.stack([row[column] for row in reference]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shapes_and_dtype_come_from_metadata(tmp_path: Path, dtype: str) -> None:
    directory = make_latents(tmp_path, "jdb", (4,), dtype=dtype)
    loader = build_latents_dataloader(directory, batch_size=2, num_workers=0, with_keys=True)
    for batch in loader:
        assert list(batch) == ["image_latents", "caption_latents", "drop_caption_mask", "key"]
        assert batch["drop_caption_mask"].tolist() == [1.0, 1.0]
        assert batch["drop_caption_mask"].dtype == torch.float32
        for n, key in enumerate(batch["key"]):
            assert np.array_equal(batch["image_latents"][n].numpy(), array_of(key, "latents_256", IMAGES[256], dtype))
            assert np.array_equal(batch["caption_latents"][n].numpy(), array_of(key, "caption_latents", CAPTION, dtype))
            assert batch["image_latents"].numpy().dtype == dtype


def test_of_moments_a_sample_is_drawn_anew_in_each_epoch(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (200,), latent_mode="moments", dtype="float32")
    channels = IMAGES[256][0] // 2

    def epochs(**options: Any) -> list[dict[str, torch.Tensor]]:
        loader = build_latents_dataloader(directory, batch_size=20, with_keys=True, **options)
        return [dict(pair for b in loader for pair in zip(b["key"], b["image_latents"], strict=True)) for _ in "12"]

    first, second = epochs(num_workers=0)
    assert len(first) == len(second) == 200
    noise = []
    for key, sample in first.items():
        mean, std = np.split(array_of(key, "latents_256", IMAGES[256], "float32"), 2)
        assert sample.shape == mean.shape == (channels, *IMAGES[256][1:])
        noise.append((sample.numpy() - mean) / np.abs(std))
        assert not torch.equal(sample, second[key])
    assert abs(np.mean(noise)) < 0.05
    assert abs(np.std(noise) - 1) < 0.05
    again = epochs(num_workers=2, shuffle=False)
    assert all(
        torch.equal(again[epoch][key], sample) for epoch in (0, 1) for key, sample in (first, second)[epoch].items()
    )


def test_a_mask_tells_padding_where_the_text_encoder_masked_it(tmp_path: Path) -> None:
    loader = build_latents_dataloader(
        make_latents(tmp_path, "jdb", (2,), caption_length=2), batch_size=2, num_workers=0
    )
    (batch,) = loader
    assert batch["caption_mask"].tolist() == [[True, True, False]] * 2
    assert batch["caption_latents"].shape == (2, *CAPTION)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_trimmed_captions_get_their_length_back(tmp_path: Path, dtype: str) -> None:
    directory = make_latents(tmp_path, "jdb", (4,), caption_length=2, text_storage="trimmed", dtype=dtype)
    for batch in build_latents_dataloader(directory, batch_size=2, num_workers=0, with_keys=True):
        assert batch["caption_latents"].shape == (2, *CAPTION)
        assert batch["caption_mask"].tolist() == [[True, True, False]] * 2
        for caption, key in zip(batch["caption_latents"].numpy(), batch["key"], strict=True):
            full = array_of(key, "caption_latents", CAPTION, dtype)
            assert np.array_equal(caption[:, :2], full[:, :2])
            assert not caption[:, 2:].any()


def test_a_trimmed_caption_of_another_length_than_it_says_is_told_with_the_row(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (2,), caption_length=2, text_storage="full")
    index = directory / "index.json"
    index.write_text(index.read_text().replace('"dtype"', '"text_storage": "trimmed", "dtype"'))
    loader = build_latents_dataloader(directory, batch_size=1, num_workers=0, shuffle=False)
    with pytest.raises(ShardError, match=r"row 0 in shard 0 has 24 bytes, but float16 \(1, 2, 4\) has 16"):
        next(iter(loader))


def test_a_single_archive_and_foreign_latents_are_read_too(tmp_path: Path) -> None:
    archive = make_latents(tmp_path, "jdb", (3,)) / "000"
    write_ledger(archive, metadata())
    foreign = make_latents(tmp_path, "old", (2,), foreign=True)
    layout = LatentsLayout(CAPTION, IMAGES)
    loader = build_latents_dataloader([archive, foreign], batch_size=1, num_workers=0, with_keys=True, layout=layout)
    assert Counter(key.split("/")[0] for key in keys_of(loader)) == {"jdb": 3, "old": 2}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_has_no_sample_twice_and_as_many_batches_as_the_length_says(
    tmp_path: Path, num_workers: int, drop_last: bool
) -> None:
    directory = make_latents(tmp_path, "jdb", (7, 4))
    loader = build_latents_dataloader(
        directory, batch_size=4, num_workers=num_workers, drop_last=drop_last, with_keys=True
    )
    for _ in range(2):
        sizes, keys = [], []
        for batch in loader:
            sizes.append(len(batch["key"]))
            keys += batch["key"]
        assert sizes == ([4, 4] if drop_last else [4, 4, 3])
        assert len(loader) == len(sizes)
        assert len(set(keys)) == len(keys)


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (20, 20))

    def epochs(**options: Any) -> list[list[str]]:
        loader = build_latents_dataloader(directory, batch_size=4, with_keys=True, **options)
        return [keys_of(loader), keys_of(loader)]

    first, second = epochs(num_workers=0, shuffle_seed=1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert epochs(num_workers=2, shuffle_seed=1) == [first, second]
    assert epochs(num_workers=0, shuffle_seed=2)[0] != first
    stored = [f"jdb/{archive}/{n}" for archive in ("000", "001") for n in range(20)]
    assert epochs(num_workers=0, shuffle=False) == [stored, stored]


@pytest.mark.parametrize(
    ("jdb", "cc12m", "expected"),
    [
        ({}, {}, {"jdb": 30, "cc12m": 10}),
        ({"repeat": 0.5}, {"repeat": 2}, {"jdb": 15, "cc12m": 20}),
        ({"choose": 6}, {"choose": 25}, {"jdb": 6, "cc12m": 25}),
        ({"proportion": 1}, {"proportion": 3}, {"jdb": 10, "cc12m": 30}),
    ],
)
def test_weights_decide_how_many_samples_an_epoch_has_of_each_stream(
    tmp_path: Path, jdb: dict, cc12m: dict, expected: dict
) -> None:
    streams = [
        LatentsStream(make_latents(tmp_path, "jdb", (20, 10)), **jdb),
        LatentsStream(make_latents(tmp_path, "cc12m", (10,)), **cc12m),
    ]
    loader = build_latents_dataloader(streams, batch_size=1, num_workers=0, with_keys=True)
    assert len(loader) == sum(expected.values())
    for _ in range(2):
        assert Counter(key.split("/")[0] for key in keys_of(loader)) == expected


@pytest.mark.parametrize(("probability", "expected"), [(0.0, {1.0}), (1.0, {0.0})])
def test_captions_are_never_or_always_dropped_at_the_ends(tmp_path: Path, probability: float, expected: set) -> None:
    directory = make_latents(tmp_path, "jdb", (50,))
    loader = build_latents_dataloader(
        directory, batch_size=5, num_workers=0, with_keys=True, caption_drop_prob=probability
    )
    assert set(masks_of(loader).values()) == expected


def test_dropped_captions_depend_on_seed_epoch_and_sample_only(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (400,))

    def masks(**options: Any) -> list[dict[str, float]]:
        loader = build_latents_dataloader(directory, batch_size=8, with_keys=True, caption_drop_prob=0.25, **options)
        return [masks_of(loader), masks_of(loader)]

    first, second = masks(num_workers=0)
    assert 60 < Counter(first.values())[0.0] < 140  # 100 expected, standard deviation 9
    assert 60 < Counter(second.values())[0.0] < 140
    assert first != second
    assert masks(num_workers=2, shuffle=False) == [first, second]
    assert masks(num_workers=0, shuffle_seed=1)[0] != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_same_batches_and_masks(tmp_path: Path, num_workers: int) -> None:
    streams = [make_latents(tmp_path, "jdb", (20, 10)), make_latents(tmp_path, "cc12m", (10,))]

    def build(shuffle_seed: int) -> Any:
        return build_latents_dataloader(
            streams,
            batch_size=4,
            num_workers=num_workers,
            with_keys=True,
            caption_drop_prob=0.5,
            shuffle_seed=shuffle_seed,
        )

    def listed(batch: dict) -> list[tuple[str, float]]:
        return list(zip(batch["key"], batch["drop_caption_mask"].tolist(), strict=True))

    loader = build(shuffle_seed=3)
    epochs = [[], [], []]
    state = None
    for epoch in epochs:
        for batch in loader:
            epoch.append(listed(batch))
            if epoch is epochs[1] and len(epoch) == 3:
                state = loader.state_dict()
    assert state is not None
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 12)

    resumed = build(shuffle_seed=4)  # the state's seed counts
    resumed.load_state_dict(state)
    assert [listed(batch) for batch in resumed] == epochs[1][3:]
    assert [listed(batch) for batch in resumed] == epochs[2]


def test_shards_come_from_a_remote_and_stay_below_the_cache_limit(tmp_path: Path) -> None:
    source = make_latents(tmp_path, "jdb", (10,) * 8)
    cache = tmp_path / "cache"
    shard_bytes = max(path.stat().st_size for path in source.rglob("*.mds"))
    # What is fetched for one worker ahead, plus the limit's own minimum of four shards and the index.
    limit = 5 * shard_bytes + (source / "index.json").stat().st_size
    stream = LatentsStream(cache, remote=str(source))
    loader = build_latents_dataloader(
        stream, batch_size=2, num_workers=0, shuffle=False, with_keys=True, cache_limit=limit
    )
    for epoch in range(2):
        assert len(set(keys_of(loader))) == 80, epoch
        assert 0 < sum(path.stat().st_size for path in cache.rglob("*.mds")) <= limit
    assert len(list(source.rglob("*.mds"))) == 8


def test_a_cache_limit_never_deletes_what_is_not_a_cache(tmp_path: Path) -> None:
    streams = [LatentsStream(tmp_path / "cache", remote="s3://bucket/jdb"), make_latents(tmp_path, "jdb", (1,))]
    with pytest.raises(SettingsError, match="would delete shards of streams without remote"):
        build_latents_dataloader(streams, batch_size=1, cache_limit="1gb")


def test_a_remote_stream_is_held_to_the_same_rules(tmp_path: Path) -> None:
    ours = make_latents(tmp_path, "jdb", (1,))
    other = LatentsStream(tmp_path / "cache", remote=str(make_latents(tmp_path, "cc12m", (1,), dtype="float32")))
    with pytest.raises(SettingsError, match=r"jdb/latents and \S+cache cannot be mixed: dtype"):
        build_latents_dataloader([ours, other], batch_size=1)


def test_latents_of_other_encoders_are_not_mixed(latents_plan, tiny_clip: Path) -> None:
    """Encoded by the stage itself, so that what it writes down is what is compared."""
    directories = []
    for tag, changes in (("open_clip", {}), ("clip", {"text_encoder": str(tiny_clip)})):
        plan = latents_plan({"train/000": 2}, encoder_tag=tag)
        plan = replace(plan, encoders=replace(plan.encoders, image_resolutions=(256,), **changes))
        encode_archives(plan, lambda event: None)
        merged = merge_indexes(plan.latents_dir, "train", plan.archives, plan.settings)
        assert merged is not None
        directories.append(merged.path.parent)
    with pytest.raises(SettingsError, match=r"cannot be mixed: caption latents \(1, 77, 64\) and \(1, 77, 32\)"):
        build_latents_dataloader(directories, batch_size=1)


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (1,))
    with pytest.raises(SettingsError, match=r"caption_drop_prob 1\.1 is out of range"):
        build_latents_dataloader(directory, batch_size=1, caption_drop_prob=1.1)
    with pytest.raises(SettingsError, match=r"not encoded at image_size 1024: it has \[256, 512\]"):
        build_latents_dataloader(directory, batch_size=1, image_size=1024)


def test_keys_of_latents_without_keys_are_refused(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "jdb", (1,))
    index = directory / "index.json"
    index.write_text(index.read_text().replace('"key"', '"id"'))
    with pytest.raises(SettingsError, match="has no keys"):
        build_latents_dataloader(directory, batch_size=1, with_keys=True)


def test_a_wrong_layout_is_told_with_the_row(tmp_path: Path) -> None:
    directory = make_latents(tmp_path, "old", (2,), foreign=True)
    layout = LatentsLayout((1, 77, 1024), IMAGES)
    loader = build_latents_dataloader(directory, batch_size=1, num_workers=0, shuffle=False, layout=layout)
    with pytest.raises(ShardError, match=r"old/latents: caption_latents of row 0 in shard 0 has 24 bytes, but float16"):
        next(iter(loader))


def test_further_options_reach_the_data_loader(tmp_path: Path) -> None:
    loader = build_latents_dataloader(
        make_latents(tmp_path, "jdb", (4,)), batch_size=2, num_workers=1, prefetch_factor=3, persistent_workers=True
    )
    assert (loader.prefetch_factor, loader.persistent_workers) == (3, True)
    assert [len(list(loader)), len(list(loader))] == [2, 2]
