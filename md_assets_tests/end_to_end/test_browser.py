"""The UI as a person uses it: a range of partitions materialized in a real browser, checks and contact sheet seen."""

import sys
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from md_assets.bench.dagster_services import free_port
from md_assets.demo.sandbox import MINIATURES
from md_assets.stages.once import published
from md_assets.storage.contact_sheet import COLUMNS, THUMBNAIL_PX
from md_assets_tests.end_to_end.conftest import SandboxCommands, read_output, screenshot, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(420)]

RUN_TIMEOUT_MS = 180_000


@pytest.fixture
def ui(commands: SandboxCommands) -> Iterator[str]:
    """The address of `md-assets demo --ui` on the small sandbox, ended as a person ends it, by Ctrl-C."""
    port = free_port()
    command = [sys.executable, "-m", "md_assets.cli", "demo", "--ui", "--folder", str(commands.sandbox.path)]
    process = commands.start(*command, "--port", str(port))
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    assert wait_for(lambda: answers() or process.poll() is not None, 120, pause_s=0.2), read_output(process)
    assert process.poll() is None, read_output(process)
    yield address
    process.send_signal(2)
    assert process.wait(60) == 0, read_output(process)


def test_a_range_of_partitions_is_materialized_from_the_ui(ui: str, page: Page, commands: SandboxCommands) -> None:
    page.goto(f"{ui}/assets/jdb/raw?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Select a partition or create one").click()
    for archive in ("train/000", "train/001"):
        page.get_by_role("menuitem").filter(has_text=archive).or_(
            page.get_by_role("option").filter(has_text=archive)
        ).first.click()
    screenshot(page, "launch-range")
    page.keyboard.press("Escape")
    expect(dialog.get_by_text("2 partitions")).to_be_visible()
    dialog.get_by_role("button", name="Launch backfill").click()

    raw = commands.sandbox.data.raw("jdb")
    assert wait_for(lambda: all(published(raw, a) for a in ("train/000", "train/001")), 180, pause_s=0.5)

    page.goto(f"{ui}/assets/jdb/raw?view=partitions&partition=train%2F001")
    expect(page.get_by_text("Materialized (2)")).to_be_visible(timeout=RUN_TIMEOUT_MS)
    expect(page.get_by_text("rejected_by_reason")).to_be_visible(timeout=RUN_TIMEOUT_MS)
    expect(page.get_by_role("cell", name="too_small", exact=True)).to_be_visible()
    screenshot(page, "raw-partition")
    # Markdown of more than 1,000 characters is behind a link in this version of the UI.
    page.get_by_role("row", name="contact_sheet").get_by_text("[Show Markdown]").click()
    sheet = page.get_by_role("img", name="samples of train/001")
    expect(sheet).to_be_visible()
    drawn_px = sheet.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert drawn_px == COLUMNS * THUMBNAIL_PX
    screenshot(page, "contact-sheet")

    page.goto(f"{ui}/assets/jdb/raw?view=checks")
    for check in ("counts_balance", "tar_intact"):
        page.get_by_text(check).first.click()
        expect(page.get_by_text("Passed").first).to_be_visible()
    screenshot(page, "raw-checks")

    page.goto(f"{ui}/asset-groups")
    for slug in MINIATURES:
        expect(page.get_by_text(slug, exact=True).first).to_be_visible()
    page.goto(f"{ui}/assets/jdb/raw")
    expect(page.get_by_text("JourneyDB/JourneyDB").first).to_be_visible()
    for module in ("datasets/jdb.py", "orchestration/stage_runs.py", "stages/raw.py"):
        expect(page.locator(f'a[href*="/md_assets/{module}:"]')).to_be_visible()
