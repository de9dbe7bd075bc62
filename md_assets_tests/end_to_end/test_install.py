"""`pip install .` in a new environment gives a package whose demo works outside the checkout."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from md_assets_tests.end_to_end.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the package installed from a built wheel.

    The dependencies (6 GB) are those of this environment, by a .pth file; that the declared list of them is complete is
    `test_conventions`' to show. This checkout is not on its path.
    """
    folder = tmp_path_factory.mktemp("install")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, files.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            target.write_bytes((REPOSITORY / name).read_bytes())
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(copy)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    dependencies = Path(site.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment / "bin"


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    place = run([str(installed / "python"), "-c", "import md_assets; print(md_assets.__file__)"], tmp_path)
    assert str(installed.parent) in place
    output = run([str(installed / "md-assets"), "demo"], tmp_path)
    assert "The training loader sees 102 samples" in output
    assert "md-assets demo --ui" in output
    assert (tmp_path / "demo_data" / "datadir" / "jdb" / "mds" / "train" / "index.json").is_file()
