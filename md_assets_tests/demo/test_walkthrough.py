"""The demo's steps; the walk itself is in `end_to_end/test_demo.py`."""

import socket
from pathlib import Path

import pytest

from md_assets.core.errors import SettingsError
from md_assets.datasets import spec_of
from md_assets.definitions import defs
from md_assets.demo.sandbox import MINIATURES
from md_assets.demo.walkthrough import BY_HAND, RANGES, archives_of_demo, run_ui, steps, ui_command


@pytest.mark.parametrize("slug", MINIATURES)
def test_every_asset_of_a_dataset_is_materialized_after_what_it_needs(slug: str) -> None:
    graph = defs.resolve_asset_graph()
    done: list[str] = []
    for name, _ in steps(spec_of(slug)):
        (key,) = (key for key in graph.get_all_asset_keys() if list(key.path) == [slug, name])
        assert {parent.path[-1] for parent in graph.get(key).parent_keys} <= set(done)
        done.append(name)
    assert sorted(done) == sorted(key.path[-1] for key in graph.get_all_asset_keys() if key.path[0] == slug)


@pytest.mark.parametrize("slug", MINIATURES)
def test_what_is_materialized_is_there_and_one_archive_of_jdb_is_left_for_the_reader(slug: str) -> None:
    taken = archives_of_demo(slug)
    assert (taken[0], taken[-1]) == RANGES[slug] and set(taken) <= set(MINIATURES[slug].archives)
    assert (BY_HAND in set(MINIATURES[slug].archives) - set(taken)) == (slug == "jdb")


def test_the_command_that_opens_the_ui_names_the_folder_only_where_it_must() -> None:
    assert ui_command(Path("demo_data")).endswith("demo --ui")
    assert ui_command(Path("/tmp/elsewhere")).endswith("demo --ui --folder /tmp/elsewhere")


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} cannot be used"):
            run_ui(tmp_path / "sandbox", port)
    assert not (tmp_path / "sandbox").exists()
