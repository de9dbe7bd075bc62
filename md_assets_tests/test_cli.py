"""The command line: exit codes, one-line errors, and what it does not import."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets import __version__
from md_assets.cli import DONE, FAILED, WRONG_USAGE, main
from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.orchestration.failures import ATTEMPT_TAG
from md_assets.storage.publish import output_file
from md_assets_tests.orchestration.test_failures import started_run

REPOSITORY = Path(__file__).parents[1]
RAW, SECOND = dg.AssetKey(["jdb", "raw"]), {ATTEMPT_TAG: "2"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish_mds: Any, mds_rows: Any) -> DataRoot:
    """A data root with two archives of raw and mds, which the command finds."""
    root = DataRoot(tmp_path / "data")
    for archive in ("train/000", "train/001"):
        publish_raw(root, publish_mds(root, "jdb", archive, mds_rows(archive, 3)))
    monkeypatch.setenv("MD_ASSETS_DATA", str(root.path))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAGSTER_HOME that knows of a killed run of raw over train/001 and train/002; not to be changed."""
    home = tmp_path_factory.mktemp("home")
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        instance.report_run_failed(started_run(instance, RAW, "train/001", "train/002", tags=SECOND), "it was killed")
    return home


def publish_raw(root: DataRoot, mds: Ledger) -> None:
    """A raw tar of any content, with the counts that mds was made from."""
    tar = root.raw("jdb").data(mds.archive)
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(b"tar")
    ledger = replace(mds, stage="raw", files=(output_file(tar, f"{mds.archive}.tar"),))
    root.raw("jdb").ledger(mds.archive).write_text(ledger.to_json())


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "md_assets.cli", *arguments]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_status_shows_every_stage(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == DONE
    text = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert rows[0] == ["jdb"]
    assert [row[:8] for row in rows if row[0] in ("raw", "mds")] == [
        ["raw", "2", "0", "0", "398", "6", "6", "0"],  # nothing says what failed
        ["mds", "0", "2", "0", "398", "6", "6", "0"],  # not made of this raw
    ]
    assert text.splitlines()[-1] == "Which archives failed is not told: DAGSTER_HOME is not set"
    assert main(["status", "jdb", "jdb"]) == DONE
    assert capsys.readouterr().out == text


def test_status_names_what_failed(
    root: DataRoot, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    assert main(["status"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("│", " ").split() for line in lines]
    assert [row[:6] for row in rows if row[0] == "raw"] == [["raw", "1", "2", "0", "0", "397"]]
    failed = [line for line in lines if line.startswith("FAILED jdb/raw: jdb train/001: run ")]
    assert [line.partition(" ended ")[2] for line in failed] == [
        "before it: it was killed (attempt 2, run_died, may pass)"
    ]
    assert "not told" not in lines[-1]

    assert main(["status", "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    (jdb,) = said["datasets"]
    assert said["failures_unknown"] is None and jdb["stages"][0]["failed"] == 2
    known = ("asset", "archive", "reason", "transient", "attempt")
    assert [[one[name] for name in known] for one in jdb["failed_archives"]] == [
        ["jdb/raw", "train/001", "run_died", True, 2],
        ["jdb/raw", "train/002", "run_died", True, 2],
    ]


@pytest.mark.parametrize("home", ["", "/nonexistent/home"])
def test_status_says_when_it_does_not_know_what_failed(
    root: DataRoot, home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", home)
    assert main(["status", "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    assert said["failures_unknown"].startswith("DAGSTER_HOME is ")
    (jdb,) = said["datasets"]
    assert jdb["failed_archives"] is None and [stage["failed"] for stage in jdb["stages"]] == [None, None, None]


def test_status_of_archives(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--archives"]) == DONE
    text = capsys.readouterr().out
    assert text.count("train/000") == 1 and text.count("train/001") == 1
    assert text.count(" raw ") == 2 and text.count(" mds ") == 2


def test_verify_passes_on_what_is_whole(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == DONE
    assert capsys.readouterr().out == "8 checks passed, 0 failed\n"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), "FAILED jdb/mds train/001 shards_intact: "),
        (lambda shard: shard.unlink(), "FAILED jdb/mds train/001 shards_intact: "),
        (lambda shard: shutil.rmtree(shard.parent), "FAILED jdb/mds train/001 shards_intact: "),
        (lambda shard: shard.parent.with_suffix(".json").write_text("{"), "FAILED jdb/mds train/001 counts_balance: "),
    ],
    ids=["cut", "absent", "no data", "ledger"],
)
def test_verify_names_what_readers_pass_over_as_damaged(
    root: DataRoot, capsys: pytest.CaptureFixture[str], spoil: Any, named: str
) -> None:
    spoil(root.mds("jdb").data("train/001") / "shard.00000.mds")
    assert main(["verify", "jdb"]) == FAILED
    output = capsys.readouterr()
    assert named in output.out and "train/000" not in output.out and "failed\n" in output.out
    assert output.err == ""


def test_verify_finds_a_flipped_byte(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    shard = root.mds("jdb").data("train/000") / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["verify"]) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED jdb/mds train/000 shards_intact: ") and str(shard) in lines[0]
    assert lines[1:] == ["7 checks passed, 1 failed"]


@pytest.mark.parametrize("arguments", [["status"], ["verify"], ["status", "--archives", "jdb"], ["verify", "jdb"]])
def test_no_data_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("MD_ASSETS_DATA", str(tmp_path / "empty"))
    assert main(arguments) == WRONG_USAGE
    error = capsys.readouterr().err
    holds_no = "jdb" if "jdb" in arguments else "dataset"
    assert error.startswith(f"md-assets: {tmp_path / 'empty'} holds no {holds_no}. Set MD_ASSETS_DATA")
    assert error.count("\n") == 1


def test_a_dataset_that_there_is_not_is_wrong_usage(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "jbd"]) == WRONG_USAGE
    assert capsys.readouterr().err.startswith("md-assets: there is no dataset 'jbd'. Choose one of cc12m, ")


def test_a_disk_error_is_one_line(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MD_ASSETS_DATA", "/" + "x" * 5000)
    assert main(["status"]) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("md-assets: ") and "File name too long" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["status", "--nonsense"],
        ["demo", "--port", "x"],
        ["backfill", "jdb"],
        ["backfill", "jdb", "--small", "--all"],
        ["backfill", "jdb", "--small", "--wait", "--dry-run"],
    ],
)
def test_wrong_arguments_are_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == WRONG_USAGE and "usage: md-assets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jbd", "--small"], "there is no dataset 'jbd'"),
        (["jdb", "--archives", "train/999"], "jdb has no archive 'train/999'"),
        (["jdb", "--small", "--stages", "raw,png"], "there is no stage 'png'"),
        (["jdb", "--small"], "DAGSTER_HOME is not set"),
    ],
)
def test_a_backfill_of_what_there_is_not_is_wrong_usage(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert main(["backfill", *arguments]) == WRONG_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"md-assets: {said}") and error.count("\n") == 1


def test_a_backfill_is_launched_unless_it_is_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    command = ["backfill", "jdb", "--archives", "train/000,train/001", "--stages", "raw"]
    planned = "jdb: 2 archives from train/000 to train/001, raw: 1 run if nothing fails"

    assert main([*command, "--dry-run"]) == DONE
    assert capsys.readouterr().out.splitlines() == [planned, "  jdb/raw: 2 archives in 1 run"]
    assert main(command) == DONE
    shown = capsys.readouterr().out.splitlines()

    with dg.DagsterInstance.get() as instance:
        (backfill,) = instance.get_backfills()
    assert shown[0] == planned
    assert f"Dagster's UI shows it at /runs/b/{backfill.backfill_id}" in shown[2]
    assert shown[3].startswith("no daemon seems to run: start `dagster dev`")


def test_nothing_that_failed_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert main(["backfill", "jdb", "--failed", "--wait"]) == DONE
    assert capsys.readouterr().out == "no archive of jdb failed last in raw, mds, latents\n"


def test_another_attempt_says_of_what_archives_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    assert main(["backfill", "jdb", "--failed", "--stages", "raw", "--dry-run"]) == DONE
    assert capsys.readouterr().out.splitlines() == [
        "jdb: 2 failed archives, raw: 1 run if nothing fails",
        "  jdb/raw: 2 archives in 1 run",
        "  2 may pass: run_died 2",
    ]


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"\n    {name} " in text for name in ("demo", "status", "verify", "backfill"))


def test_it_is_started_as_a_module() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"md_assets {__version__}\n", "")


def test_exit_codes_reach_the_shell(root: DataRoot) -> None:
    assert command("status", "jbd").returncode == WRONG_USAGE
    root.raw("jdb").data("train/000").write_bytes(b"")
    done = command("verify")
    assert (done.returncode, done.stderr) == (FAILED, "")
    assert done.stdout.startswith("FAILED jdb/raw train/000 tar_intact: 0 bytes")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["status"], ["status", "--archives"], ["status", "--json"], ["verify"]]
)
def test_nothing_heavy_is_imported(root: DataRoot, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom md_assets.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'streaming', 'diffusers', 'transformers', 'open_clip', 'dagster')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
