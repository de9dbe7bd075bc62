"""Two runs of the same archive at the same time: one result, no damage."""

import pytest

from md_assets.stages.once import published
from md_assets.stages.verify import verify_archive
from md_assets_tests.end_to_end.conftest import ARCHIVE, SandboxCommands, wait_for
from md_assets_tests.end_to_end.test_kill import temporaries

ARCHIVE_FILE = "train/imgs/000.tgz"

pytestmark = pytest.mark.slow


def test_the_second_run_waits_and_passes_over(commands: SandboxCommands) -> None:
    raw = commands.sandbox.data.raw("jdb")
    # Two first runs at once break over creating Dagster's own tables.
    commands.finish(commands.materialize("jdb/raw", "valid/000"))
    # Slow enough that the second run comes while the first one fetches.
    commands.hub.faults.throttle(f"*/{ARCHIVE_FILE}", bytes_per_s=60_000)

    first = commands.materialize("jdb/raw", ARCHIVE)
    second = commands.materialize("jdb/raw", ARCHIVE)
    assert wait_for(lambda: (raw.path / "train" / ".000.tmp").exists(), 60)
    outputs = [commands.finish(first), commands.finish(second)]

    assert sorted("already published, passed over" in output for output in outputs) == [False, True]
    assert sorted("another run works on it, waiting" in output for output in outputs) == [False, True]
    assert published(raw, ARCHIVE) is not None
    assert all(verdict.passed for verdict in verify_archive(raw, None, ARCHIVE))
    assert temporaries(raw.path) == []
    fetched = [request for request in commands.hub.history if request.kind == "cdn" and ARCHIVE_FILE in request.name]
    assert len(fetched) == 1
