"""Both encoders: the bytes of a row, and where and in what they run."""

import numpy as np
import pytest
import torch

from md_assets.core.errors import SettingsError
from md_assets.core.schema import latents_columns
from md_assets.encoders.batches import Batch, crops_of
from md_assets.encoders.bundle import Encoders, pick_device, share_cpu
from md_assets.encoders.vae import posterior_noise


@pytest.fixture(scope="module")
def encoders(tiny_encoders) -> Encoders:
    return Encoders.load(tiny_encoders.settings(), "cpu")


def batch_of(rows, encoders: Encoders) -> Batch:
    to = encoders.preparation
    crops = [crops_of(row["key"], row["jpg"], to.resolutions_px) for row in rows]
    return Batch(
        archive="a",
        **{column: [row[column] for row in rows] for column in ("key", "caption", "width", "height", "jpg")},
        tokens=to.tokenize([row["caption"] for row in rows]),
        faults=[""] * len(rows),
        images_BCHW={px: torch.stack([crop[px] for crop in crops]) for px in to.resolutions_px},
        noise_BChw={
            px: torch.stack([posterior_noise(to.seed, row["key"], px, to.noise_channels) for row in rows])
            for px in to.resolutions_px
            if to.noise_channels
        },
    )


def test_a_row_has_the_columns_of_the_schema_and_their_numbers(encoders: Encoders, mds_rows, tiny_encoders) -> None:
    rows = mds_rows("a", 3)
    batch = batch_of(rows, encoders)
    encoded = encoders.encode(batch)
    stored = encoded.rows()
    assert [list(row) for row in stored] == [list(latents_columns((32, 64), False))] * 3
    assert encoded.undecodable() == encoded.not_finite() == []
    layout = encoders.layout()
    assert layout["caption_latents"] == [1, 77, 64]
    assert layout["image_latents"] == {"32": [4, 4, 4], "64": [4, 8, 8]}
    for i, row in enumerate(stored):
        assert {k: row[k] for k in ("key", "caption", "width", "height")} == {
            k: rows[i][k] for k in ("key", "caption", "width", "height")
        }
        for column, size in [("caption_latents", layout["caption_latents"]), ("latents_64", [4, 8, 8])]:
            array = np.frombuffer(row[column], dtype=layout["dtype"]).reshape(size)
            assert np.array_equal(array.squeeze(), encoded.arriving.get()[column][i].numpy())


def test_float32_is_float32_on_a_gpu_too(tiny_encoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rounds what convolutions take to TF32 unless it is told not to."""
    for dtype, rounded in (("bfloat16", True), ("float32", False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        Encoders.load(tiny_encoders.settings(model_dtype=dtype), "cpu")
        assert torch.backends.cudnn.allow_tf32 == rounded
    assert not torch.backends.cuda.matmul.allow_tf32  # the default


def test_layout_names_what_made_the_numbers(encoders: Encoders, tiny_encoders) -> None:
    layout = encoders.layout()
    assert {k: layout[k] for k in ("dtype", "device", "model_dtype", "vae", "text_encoder")} == {
        "dtype": "float16",
        "device": "cpu",
        "model_dtype": "float32",
        "vae": str(tiny_encoders.vae),
        "text_encoder": f"openclip:local-dir:{tiny_encoders.open_clip}",
    }


def test_the_jpeg_comes_along_when_asked_for(tiny_encoders, mds_rows) -> None:
    encoders = Encoders.load(tiny_encoders.settings(save_images=True, save_dtype="float32"), "cpu")
    (row,) = encoders.encode(batch_of(mds_rows("a", 1), encoders)).rows()
    assert list(row) == list(latents_columns((32, 64), True))
    assert row["jpg"] == mds_rows("a", 1)[0]["jpg"]
    assert len(row["caption_latents"]) == 77 * 64 * 4
    assert len(row["latents_64"]) == 4 * 8 * 8 * 4


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_is_not_finite_after_the_cast_is_found(encoders: Encoders, mds_rows, value: float) -> None:
    """1e6 is finite, but not in float16."""
    batch = batch_of(mds_rows("a", 4), encoders)
    batch.noise_BChw[32][2, 0, 0, 0] = value * 1e3
    encoded = encoders.encode(batch)
    assert (encoded.not_finite(), encoded.undecodable()) == (["a/0002"], [])


def test_a_row_that_cannot_be_encoded_moves_no_other(encoders: Encoders, mds_rows) -> None:
    whole = encoders.encode(batch_of(mds_rows("a", 4), encoders)).rows()
    batch = batch_of(mds_rows("a", 4), encoders)
    batch.faults[1] = "it cannot be decoded"
    batch.images_BCHW[64][1] = 0
    encoded = encoders.encode(batch)
    assert (encoded.undecodable(), encoded.not_finite()) == (["a/0001"], [])
    assert encoded.rows() == [whole[0], *whole[2:]]
    for column, array in encoded.values().items():
        stored = np.stack([np.frombuffer(row[column], np.float16) for row in encoded.rows()])
        assert np.array_equal(array.reshape(3, -1), stored.astype(np.float32))
    assert encoded.caption_lengths() == [77] * 3


@pytest.mark.parametrize("text", ["open_clip", "clip", "t5"])
def test_trimmed_captions_are_the_beginning_of_full_ones(
    tiny_encoders, tiny_clip, tiny_t5, mds_rows, text: str
) -> None:
    folders = {"clip": str(tiny_clip), "t5": str(tiny_t5)}
    chosen = {"text_encoder": folders[text]} if text in folders else {}
    rows, stored = mds_rows("a", 3), {}
    rows[1]["caption"], rows[2]["caption"] = "", "the quick brown fox " * 100
    for storage in ("full", "trimmed"):
        encoders = Encoders.load(tiny_encoders.settings(**chosen, text_storage=storage), "cpu")
        stored[storage] = encoders.encode(batch_of(rows, encoders)).rows()
    width, length = encoders.text.width, encoders.text.length
    assert encoders.layout()["text_storage"] == "trimmed"
    assert encoders.layout()["caption_latents"] == [1, length, width]
    for full, trimmed in zip(stored["full"], stored["trimmed"], strict=True):
        own = trimmed["caption_length"]
        assert len(trimmed["caption_latents"]) == own * width * 2
        assert full["caption_latents"].startswith(trimmed["caption_latents"])
        assert len(full["caption_latents"]) == length * width * 2
        assert {**full, "caption_latents": b"", "caption_length": own} == {**trimmed, "caption_latents": b""}
    assert [row["caption_length"] for row in stored["trimmed"]][1:] == [1 if text == "t5" else 2, length]


def test_captions_whose_end_is_not_told_are_not_trimmed(tiny_encoders, encoders: Encoders, monkeypatch) -> None:
    monkeypatch.setattr(encoders.text, "tells_end", False)
    settings = tiny_encoders.settings(text_storage="trimmed")
    with pytest.raises(SettingsError, match=r"tinyclip does not tell where a caption ends.*Set text_storage to full"):
        Encoders(settings, encoders.vae, encoders.text, encoders.device, torch.float32)


def test_bfloat16_runs_on_a_cpu_too(encoders: Encoders, tiny_encoders, mds_rows) -> None:
    half = Encoders.load(tiny_encoders.settings(model_dtype="bfloat16"), "cpu")
    assert half.model_dtype == "bfloat16"
    (row,) = half.encode(batch_of(mds_rows("a", 1), half)).rows()
    (full,) = encoders.encode(batch_of(mds_rows("a", 1), encoders)).rows()
    a, b = (np.frombuffer(r["latents_64"], np.float16).astype(float) for r in (row, full))
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.02


def values(row, column: str, dtype: str = "float32") -> np.ndarray:
    return np.frombuffer(row[column], dtype)


def test_the_modes_store_parts_of_one_posterior(tiny_encoders, mds_rows) -> None:
    rows, stored = mds_rows("a", 2), {}
    for mode in ("sample", "mean", "moments"):
        encoders = Encoders.load(tiny_encoders.settings(latent_mode=mode, save_dtype="float32"), "cpu")
        stored[mode] = encoders.encode(batch_of(rows, encoders)).rows()
        channels = 8 if mode == "moments" else 4
        assert encoders.layout()["image_latents"]["64"] == [channels, 8, 8]
        assert encoders.layout()["latent_mode"] == mode
    for i in range(2):
        mean, std = np.split(values(stored["moments"][i], "latents_64"), 2)
        noise = posterior_noise(0, rows[i]["key"], 64, 4).numpy().ravel()
        assert np.array_equal(mean, values(stored["mean"][i], "latents_64"))
        np.testing.assert_allclose(mean + std * noise, values(stored["sample"][i], "latents_64"), rtol=1e-5, atol=1e-6)
        assert (std > 0).all()


def test_of_a_t5_the_length_of_each_caption_is_stored(tiny_encoders, tiny_t5, mds_rows) -> None:
    encoders = Encoders.load(tiny_encoders.settings(text_encoder=str(tiny_t5)), "cpu")
    rows = mds_rows("a", 2)
    rows[1]["caption"] = "a cat"
    stored = encoders.encode(batch_of(rows, encoders)).rows()
    assert list(stored[0]) == list(latents_columns((32, 64), False, with_caption_length=True))
    expected = encoders.text.tokenize([row["caption"] for row in rows]).own_B.tolist()
    assert [row["caption_length"] for row in stored] == expected
    assert expected[1] < expected[0] < 120
    assert encoders.layout()["caption_latents"] == [1, 120, 32]


def out_of_memory_above(encoders: Encoders, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the VAE fail for larger batches; returns the sizes that it is asked for."""
    encode, asked = encoders.vae.encode, []

    def limited(images_BCHW):
        asked.append(len(images_BCHW))
        if len(images_BCHW) > rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return encode(images_BCHW)

    monkeypatch.setattr(encoders.vae, "encode", limited)
    return asked


def test_memory_that_is_not_enough_halves_this_batch_and_the_next(tiny_encoders, mds_rows, monkeypatch) -> None:
    encoders = Encoders.load(tiny_encoders.settings(image_resolutions=(32,)), "cpu")
    batch = batch_of(mds_rows("a", 9), encoders)
    whole = encoders.encode(batch)
    assert whole.rows_at_once is None
    asked = out_of_memory_above(encoders, 2, monkeypatch)
    halved = encoders.encode(batch)
    assert (halved.rows_at_once, asked) == (2, [9, 4, 2, 2, 2, 2, 1])
    assert [row["key"] for row in halved.rows()] == [row["key"] for row in whole.rows()]
    for one, other in zip(halved.rows(), whole.rows(), strict=True):
        np.testing.assert_allclose(values(one, "latents_32", "float16"), values(other, "latents_32", "float16"), 1e-3)
    asked.clear()
    encoders.encode(batch_of(mds_rows("b", 3), encoders))
    assert asked == [2, 1]


@pytest.mark.parametrize(
    ("said", "halves"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_memory_errors_without_a_type_are_told_from_others(encoders, mds_rows, monkeypatch, said, halves) -> None:
    encode, failed = encoders.vae.encode, []

    def limited(images_BCHW):
        if len(images_BCHW) > 1:
            failed.append(len(images_BCHW))
            raise RuntimeError(said)
        return encode(images_BCHW)

    monkeypatch.setattr(encoders.vae, "encode", limited)
    monkeypatch.setattr(encoders, "rows_at_once", None)
    batch = batch_of(mds_rows("a", 2), encoders)
    if halves:
        assert encoders.encode(batch).rows_at_once == 1
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            encoders.encode(batch)
    assert failed == [2]


def test_one_image_that_does_not_fit_is_told_with_its_remedy(tiny_encoders, mds_rows, monkeypatch) -> None:
    encoders = Encoders.load(tiny_encoders.settings(), "cpu")
    out_of_memory_above(encoders, 0, monkeypatch)
    with pytest.raises(
        SettingsError, match=r"not even one image fits .*Tried to allocate 2\.00 GiB.*image_resolutions"
    ):
        encoders.encode(batch_of(mds_rows("a", 2), encoders))


def test_each_process_gets_its_own_gpu_as_far_as_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device("auto", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(pick_device("cuda", 1)) == "cuda:1"
    assert str(pick_device("cuda:0", 1)) == "cuda:0"
    assert str(pick_device("cpu", 1)) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(pick_device("auto", 1)) == "cpu"


def test_processes_share_the_cpu() -> None:
    share_cpu(10_000)
    assert torch.get_num_threads() == 1
    share_cpu(1)
    alone = torch.get_num_threads()
    share_cpu(2)
    assert torch.get_num_threads() == max(1, alone // 2)
