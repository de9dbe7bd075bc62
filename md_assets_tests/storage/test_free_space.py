"""Whether the disk has room."""

import shutil
from pathlib import Path

import pytest

from md_assets.core.errors import SourceError
from md_assets.storage.free_space import require_space


def test_room_is_required_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def disk_usage(folder: Path) -> object:
        asked.append(folder)
        return usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_space("a.tar", tmp_path, 1000)
    require_space("a.tar", tmp_path, -5)
    with pytest.raises(SourceError) as caught:
        require_space("a.tar", tmp_path, 1001)
    assert set(asked) == {tmp_path}
    assert caught.value.reason == "disk_full" and not caught.value.transient
    assert (
        caught.value.what == f"a.tar: too little space is left in {tmp_path}, 1000 bytes are free and 1001 are needed"
    )
    assert "md-assets prune" in caught.value.remedy and "MD_ASSETS_DATA" in caught.value.remedy
