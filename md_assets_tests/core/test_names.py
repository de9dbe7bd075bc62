"""Names from archives: whatever they are, what comes out is harmless, and different ones stay different."""

from pathlib import PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from md_assets.core.names import IMAGE_SUFFIXES, first_of, refused_name, safe_name, sample_key
from md_assets.core.paths import checked_archive_id

# As tarfile gives them: any bytes, decoded with surrogateescape; and short ones of the dangerous characters.
MEMBER_NAMES = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape")) | st.text(
    st.sampled_from("./\\%a\0\n\x7f\u202e\udcff"), max_size=8
)


@given(MEMBER_NAMES)
def test_a_safe_name_stays_inside_and_fits_in_a_line(name: str) -> None:
    safe = safe_name(name)
    if safe is not None:
        path = PurePosixPath(safe)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert str(path) == safe
        assert safe.isprintable()
        assert "\\" not in safe
        assert safe.encode("utf-8").decode("utf-8") == safe


@given(MEMBER_NAMES, MEMBER_NAMES)
@example("a%00", "a\0")
@example("\udcc3\udca9", "é")
@example("a\\b", "a%5Cb")
def test_different_names_stay_different(one: str, other: str) -> None:
    def meaning(name: str) -> list[str]:
        return [part for part in name.split("/") if part not in ("", ".")]

    if safe_name(one) is not None and meaning(one) != meaning(other):
        assert safe_name(one) != safe_name(other)


@pytest.mark.parametrize("name", ["", ".", "./", "..", "../x", "a/../b", "a/..", "/etc/passwd", "//x", "./../x"])
def test_a_name_that_leads_outside_or_nowhere_is_none(name: str) -> None:
    assert safe_name(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./000/a.jpg", "000/a.jpg"),
        ("000//a.jpg", "000/a.jpg"),
        ("a..b.jpg", "a..b.jpg"),
        ("grün/猫 1.jpg", "grün/猫 1.jpg"),
        ("a\nb.jpg", "a%0Ab.jpg"),
        ("100%.jpg", "100%25.jpg"),
        ("a\\b.jpg", "a%5Cb.jpg"),
        ("a\udcff.jpg", "a%FF.jpg"),
        ("a\u202eb.jpg", "a%E2%80%AEb.jpg"),
    ],
)
def test_only_what_could_harm_is_spelled_otherwise(name: str, expected: str) -> None:
    assert safe_name(name) == expected


@given(MEMBER_NAMES, MEMBER_NAMES)
@example("/a", "a")
@example("../a", "%2E%2E/a")
@example("/../a", "../a")
def test_refused_names_are_harmless_and_like_no_other(one: str, other: str) -> None:
    def shown(name: str) -> str:
        return safe_name(name) or refused_name(name)

    def meaning(name: str) -> list[str]:
        return ["/"] * name.startswith("/") + [part for part in name.split("/") if part not in ("", ".")]

    assert safe_name(shown(one)) is not None and shown(one).isprintable()
    assert (shown(one) == shown(other)) == (meaning(one) == meaning(other))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../x", "%2E%2E/x"),
        ("a/../x", "a/%2E%2E/x"),
        ("/etc/passwd", "%2Fetc/passwd"),
        ("//../x\n", "%2F%2E%2E/x%0A"),
        ("", "%2E"),
        ("/", "%2F"),
    ],
)
def test_what_a_refused_member_is_called(name: str, shown: str) -> None:
    assert refused_name(name) == shown


@pytest.mark.parametrize(
    ("archive", "name", "key"),
    [
        ("train/000", "000/0a1b2c.jpg", "train/000/0a1b2c"),
        ("train/000", "0a1b2c.JPG", "train/000/0a1b2c"),
        ("train/000", "001/0a1b2c.jpg", "train/000/001/0a1b2c"),
        ("train/000", "000", "train/000/000"),
        ("sa_000000", "sa_1.webp", "sa_000000/sa_1"),
        ("sa_000000", "a.b.jpg", "sa_000000/a%2Eb"),
        ("sa_000000", "notes.txt", "sa_000000/notes%2Etxt"),
        ("sa_000000", ".jpg", "sa_000000/%2Ejpg"),
    ],
)
def test_keys(archive: str, name: str, key: str) -> None:
    assert sample_key(archive, name) == key


@given(MEMBER_NAMES)
def test_a_key_is_below_its_archive_and_webdataset_takes_it_whole(name: str) -> None:
    safe = safe_name(name)
    if safe is not None:
        key = sample_key("train/000", safe)
        assert key.startswith("train/000/")
        assert "." not in key
        assert checked_archive_id(key) == key


def test_suffixes_are_in_the_case_that_they_are_compared_in() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_the_first_of_many_names() -> None:
    assert first_of([]) == "" and first_of(["a", "b", "c"]) == "a, b, c"
    assert first_of([str(n) for n in range(1204)]) == "0, 1, 2 and 1,201 more"
    assert first_of(["a", "b"], 1) == "a and 1 more"
