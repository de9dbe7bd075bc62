"""The one door to all containers: what went in comes out, equal and in order, whatever the container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md_assets.core.ledger import Reason
from md_assets.core.names import refused_name, safe_name
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.made_archives import CONTAINERS, LAYOUT, archive_of

Named = Sequence[tuple[str, bytes]]

# Not: surrogates, which UTF-8 cannot spell; NUL, which ends a name in a tar; `/` at the end, which makes a folder.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300).filter(
    lambda name: not name.endswith("/")
)
DATA = st.one_of(st.binary(max_size=2000), st.builds(bytes, st.integers(500, 1_100_000)))


@pytest.mark.parametrize("container", CONTAINERS)
@given(members=st.lists(st.tuples(NAMES, DATA), max_size=6))
@settings(max_examples=25, deadline=None)
def test_members_come_back_equal_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, container: str, members: Named
) -> None:
    path = tmp_path_factory.getbasetemp() / "archive"
    path.write_bytes(archive_of(container, members))
    read = list(iter_members(path, CONTAINERS[container], 2**21, parquet=LAYOUT))
    assert [(m.name, m.data) for m in read] == [
        (safe_name(name), data) if safe_name(name) else (refused_name(name), b"") for name, data in members
    ]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_limit_is_inclusive_and_positions_rise(tmp_path: Path, container: str) -> None:
    path = tmp_path / "archive"
    path.write_bytes(archive_of(container, [("a", b"1" * 1000), ("b", b"2" * 1001), ("c", b"")]))
    positions: list[int] = []
    members = iter_members(path, CONTAINERS[container], 1000, positions.append, LAYOUT)
    read = [(member.name, member.data, member.refused) for member in members]
    assert read == [("a", b"1" * 1000, None), ("b", b"", Reason.TOO_LARGE), ("c", b"", None)]
    assert len(positions) == 3 and positions == sorted(positions) and positions[0] > 0
    assert positions[-1] <= path.stat().st_size
