"""Encoding processes as a run starts and ends them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.settings import DEFAULT_VAE
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration import latents_launch
from md_assets.orchestration.latents_launch import (
    MESSAGES_POLL_S,
    WholeMessages,
    launch_command,
    waiting_environment,
)
from md_assets.storage.hub import HubClient
from md_assets.storage.mds import iter_rows
from md_assets_tests.end_to_end.conftest import wait_for
from md_assets_tests.orchestration.conftest import Platform


def test_several_processes_are_started_by_torchrun_and_one_is_not() -> None:
    config = Path("accelerate.yaml")
    assert "--multi_gpu" in launch_command(3, config) and "--multi_gpu" not in launch_command(1, config)
    for count in (1, 3):
        command = launch_command(count, config)
        assert command[command.index("--num_processes") + 1] == str(count)
        assert command[-2:] == ["--module", "md_assets.orchestration.latents_worker"]


def test_how_threads_wait_is_left_to_whoever_has_set_it() -> None:
    assert waiting_environment({"A": "b"}) == {"A": "b", "GOMP_SPINCOUNT": "10000"}
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}):
        assert waiting_environment(own) == own


def test_half_a_message_is_waited_for(tmp_path: Path) -> None:
    """Dagster's own reader takes it for a whole one, and reads nothing that follows."""
    taken: list[Any] = []

    class Handler:
        def handle_message(self, message: Any) -> None:
            taken.append(message)

    file = tmp_path / "messages"
    with WholeMessages(str(file)).read_messages(Handler()):  # type: ignore[arg-type]
        with file.open("a") as written:
            written.write('{"method": "log", "params": {"picture": "AAAA')
            written.flush()
            time.sleep(5 * MESSAGES_POLL_S)
            assert taken == []
            written.write('BBBB"}}\n{"method": "closed"}\n')
        assert wait_for(lambda: len(taken) == 2, 30)
        with file.open("a") as written:
            written.write('{"method": "last"}\n')
    assert taken == [{"method": "log", "params": {"picture": "AAAABBBB"}}, {"method": "closed"}, {"method": "last"}]


@pytest.mark.slow
def test_what_is_published_is_recorded_though_nobody_could_say_so(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a process is killed between publishing an archive and saying so."""
    monkeypatch.setattr(latents_launch._Events, "take", lambda self, messages: None)
    platform.up_to("mds", "train/000", "train/001")
    result = platform.run("jdb/latents", "train/000", "train/001")
    assert result.success, failure_of(result)
    assert {m.partition for m in result.asset_materializations_for_node("jdb__latents")} == {"train/000", "train/001"}


@pytest.mark.slow
def test_two_processes_publish_and_each_archive_is_recorded(platform: Platform) -> None:
    """That their rows are those of one process is shown in `test_latents_worker`."""
    archives = ("train/000", "train/001")
    platform.up_to("mds", *archives)
    result = platform.run("jdb/latents", *archives, encoders={"num_processes": 2})
    assert result.success, failure_of(result)
    recorded = {m.partition: m.metadata for m in result.asset_materializations_for_node("jdb__latents")}
    assert sorted(recorded) == sorted(archives)
    for archive in archives:
        assert str(recorded[archive]["crop_and_decoded"].value).count("](data:image/jpeg;base64,") == 1
        stored, given = (iter_rows(platform.dir(stage).data(archive)) for stage in ("latents", "mds"))
        assert [row["key"] for row in stored] == [row["key"] for row in given]


@pytest.mark.slow
def test_the_default_encoders_come_from_the_hub_at_its_commit(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.up_to("mds", "train/000")
    # The sandbox's tiny encoders, served under the names of the default pair.
    (platform.sandbox.hub_root / "models").symlink_to(platform.sandbox.path / "models")
    for name in ("MD_ASSETS_VAE", "MD_ASSETS_TEXT_ENCODER"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the field says where the Hub is, not the variable

    result = platform.run("jdb/latents", "train/000", hub={"endpoint": platform.hub.endpoint})

    assert result.success, failure_of(result)
    ledger = platform.ledger("latents", "train/000")
    assert ledger is not None
    client = HubClient(endpoint=platform.hub.endpoint)
    assert ledger.settings["encoders"]["vae_revision"] == client.revision(DEFAULT_VAE, "model")
    assert ledger.details["vae"] == DEFAULT_VAE


def test_an_encoder_that_cannot_be_loaded_ends_the_run_with_one_sentence(platform: Platform) -> None:
    platform.up_to("mds", "train/000")
    vae = Path(os.environ["MD_ASSETS_VAE"], "vae")
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")

    result = platform.run("jdb/latents", "train/000")

    assert not result.success
    assert failure_of(result).startswith("No latents were encoded: ")
    assert platform.ledger("latents", "train/000") is None


@pytest.mark.slow
def test_a_killed_process_is_said_and_its_archive_can_be_done_again(platform: Platform) -> None:
    platform.up_to("mds", "train/000")
    workspace = platform.dir("latents").path / "train" / ".000.tmp"
    killer = threading.Thread(target=_kill_worker_once, args=(workspace.exists,))
    killer.start()
    result = platform.run("jdb/latents", "train/000")
    killer.join()

    assert not result.success
    assert "its encoding process ended" in failure_of(result)
    assert platform.ledger("latents", "train/000") is None
    assert platform.run("jdb/latents", "train/000").success
    assert not workspace.exists()


def _kill_worker_once(begun: Callable[[], bool]) -> None:
    """kill -9 of the encoding process that descends from this one, once `begun`."""
    while not begun():
        threading.Event().wait(0.001)
    (worker,) = (pid for pid in _descendants(os.getpid()) if _is_worker(pid))
    os.kill(worker, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


def _is_worker(pid: int) -> bool:
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return latents_launch.WORKER_MODULE in arguments and "accelerate.commands.launch" not in arguments
