"""A PostgreSQL of one's own: it answers with its password, and nothing of it stays."""

import os
import socket
from pathlib import Path

import pytest
import sqlalchemy

from md_assets.bench import postgres_server as module
from md_assets.bench.postgres_server import postgres_server
from md_assets.core.errors import SettingsError

pytestmark = pytest.mark.postgres


@pytest.fixture(autouse=True)
def installed() -> None:
    try:
        module._program("initdb")
    except SettingsError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


def test_it_answers_until_the_block_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders: list[Path] = []

    def made(prefix: str) -> str:
        folder = Path("/tmp" if os.getuid() == 0 else tmp_path, f"{prefix}{os.getpid()}")  # others may enter /tmp
        folder.mkdir()
        folders.append(folder)
        return str(folder)

    monkeypatch.setattr(module.tempfile, "mkdtemp", made)
    with postgres_server(durable=False) as variables:
        parts = {name.removeprefix("MD_ASSETS_POSTGRES_"): value for name, value in variables.items()}
        address = "postgresql+psycopg2://{USER}:{PASSWORD}@{HOST}:{PORT}/{DATABASE}".format(**parts)
        with sqlalchemy.create_engine(address).connect() as connection:
            assert connection.execute(sqlalchemy.text("SELECT current_user, current_setting('fsync')")).one() == (
                "dagster",
                "off",
            )
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(parts["PORT"]))) != 0
    assert [folder.exists() for folder in folders] == [False]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(SettingsError, match="initdb is not installed"), postgres_server():
        pass
