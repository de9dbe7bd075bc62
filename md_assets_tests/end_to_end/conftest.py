"""Real commands on a sandbox: `dagster` and `md-assets` as users start them, in processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.demo.journeydb import write_miniature_journeydb
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.walkthrough import Sandbox, environment_variables, materialize

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES, SIZE_PX = 12, 320
ARCHIVE = "train/000"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

SCREENSHOTS = os.environ.get("MD_ASSETS_SCREENSHOTS")
"""Where to leave pictures for the docs; they are not kept otherwise."""


@dataclass
class Commands:
    """Starts commands in a folder and ends those that are still running when the test is over."""

    folder: Path
    sandbox_environment: Mapping[str, str]
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @classmethod
    def bare(cls, folder: Path) -> "Commands":
        """Commands in an empty folder, with nothing set for them."""
        return cls(folder, {})

    def environment(self, data_root: Path | None = None) -> dict[str, str]:
        environment = {**os.environ, **self.sandbox_environment, "PYTHONPATH": str(REPOSITORY)}
        environment.pop("HF_TOKEN", None)
        if data_root is not None:
            environment[DATA_ROOT_VARIABLE] = str(data_root)
        return environment

    def start(self, *command: str, data_root: Path | None = None) -> "subprocess.Popen[str]":
        """A command in a process group of its own; its output is in `read_output`."""
        output = (self.folder / f"output-{len(self.started)}.txt").open("w+")
        process = subprocess.Popen(
            command,
            env=self.environment(data_root),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        process.stdout = output
        self.started.append(process)
        return process

    def materialize(self, asset: str, partition: str, data_root: Path | None = None) -> "subprocess.Popen[str]":
        """`dagster asset materialize` of one partition, with tiny resolutions for latents."""
        command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "md_assets.definitions"]
        return self.start(*command, "--select", f'key:"{asset}"', "--partition", partition, data_root=data_root)

    def end(self) -> None:
        """End what is still running."""
        for process in self.started:
            if process.poll() is None:
                kill_group(process)
            assert process.stdout is not None
            process.stdout.close()

    def finish(self, process: "subprocess.Popen[str]", timeout_s: float = 240) -> str:
        """The command's output, once it has ended without an error."""
        code = process.wait(timeout_s)
        output = read_output(process)
        assert code == 0, output
        return output


@dataclass(kw_only=True)
class SandboxCommands(Commands):
    """Commands whose Hub, encoders and data are a sandbox's."""

    sandbox: Sandbox
    hub: LoopbackHub


def read_output(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    process.stdout.seek(0)
    return process.stdout.read()


def kill_group(process: "subprocess.Popen[str]") -> None:
    """kill -9 of a process and everything it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], object], timeout_s: float, pause_s: float = 0.001) -> bool:
    """Whether `condition` came true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause_s)
    return False


@pytest.fixture(scope="session")
def prepared_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    sandbox = Sandbox(tmp_path_factory.mktemp("end_to_end"))
    sandbox.prepare(SAMPLES, SIZE_PX, datasets=["jdb"])
    return sandbox


def sandbox_of(prepared: Sandbox, folder: Path, archives: Sequence[str], samples: int, size_px: int) -> Sandbox:
    """A sandbox whose Hub has these archives of jdb, with the encoders of a prepared one."""
    sandbox = Sandbox(folder / "sandbox")
    sandbox.path.mkdir()
    (sandbox.path / "models").symlink_to(prepared.path / "models")
    write_miniature_journeydb(sandbox.hub_root, archives, samples, size_px)
    sandbox.prepare(datasets=())
    return sandbox


@pytest.fixture(scope="session")
def undisturbed(prepared_sandbox: Sandbox) -> DataRoot:
    """What undisturbed runs make of `ARCHIVE`, up to mds; not to be changed."""
    with (
        LoopbackHub(prepared_sandbox.hub_root) as hub,
        environment_variables(prepared_sandbox.environment(hub.endpoint)),
        dg.DagsterInstance.get() as instance,
    ):
        for asset in ("jdb/annotations", "jdb/raw", "jdb/mds"):
            partitions = None if asset == "jdb/annotations" else (ARCHIVE, ARCHIVE)
            assert materialize(instance, asset, partitions).success
    return prepared_sandbox.data


@pytest.fixture
def commands(prepared_sandbox: Sandbox, tmp_path: Path) -> Iterator[SandboxCommands]:
    """Sources and encoders are shared; data root and Dagster's records are the test's own."""
    sandbox = Sandbox(tmp_path / "sandbox")
    sandbox.path.mkdir()
    for shared in ("models", "hub"):
        (sandbox.path / shared).symlink_to(prepared_sandbox.path / shared)
    sandbox.prepare(SAMPLES, SIZE_PX, datasets=["jdb"])
    with LoopbackHub(sandbox.hub_root) as hub:
        commands = SandboxCommands(sandbox.path, sandbox.environment(hub.endpoint), sandbox=sandbox, hub=hub)
        yield commands
        commands.end()


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing; make system-packages installs it")
        pytest.skip("chromium is missing; make system-packages, as root, installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)  # instead of 5 s
        yield page
        browser.close()


def screenshot(page: Page | Locator, name: str) -> None:
    """Leave a picture of a page or a part of it, where one is asked for."""
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"))
