"""Captions of any dataset, from a file on disk, and raw archives whose pictures nobody decodes."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, raw_settings
from md_assets.core.source import BytesProgress, RemoteFile
from md_assets.core.spec import DatasetSpec
from md_assets.stages.annotations import index_annotations
from md_assets.stages.mds import convert_archive
from md_assets.storage.images import StoredImage
from md_assets.storage.mds import iter_rows
from md_assets.storage.publish import publish, scratch, with_files, workspace
from md_assets.storage.raw_tar import RawTarWriter


class Copying:
    """A source that is a file on this disk."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        shutil.copyfile(self.file, destination)
        return remote


@dataclass
class Captioned:
    """A dataset below `root` whose captions are those of `file`."""

    spec: DatasetSpec
    root: DataRoot
    file: Path

    def annotations(self) -> Ledger:
        """Run the annotations stage."""
        (source,) = self.spec.annotations
        content_id = f"{self.file.stat().st_mtime_ns}"
        remote = RemoteFile(f"org/name:{self.file.name}", "", None, None, content_id, "r")
        return index_annotations(self.spec, source, remote, self.root, fetcher=Copying(self.file)).ledger

    def raw(
        self,
        archive: str,
        names: Sequence[str] | Mapping[str, str | None],
        rejected: Mapping[str, Sequence[str]] | None = None,
        orphans: int = 0,
    ) -> None:
        """Publish a raw archive with these samples, with captions of their own where `names` is a mapping."""
        stage_dir = self.root.raw(self.spec.slug)
        captions = names if isinstance(names, Mapping) else dict.fromkeys(names)
        keys = {reason: [f"{archive}/{name}" for name in names] for reason, names in (rejected or {}).items()}
        with workspace(stage_dir.ledger(archive)) as own:
            tar = scratch(own, "out") / "raw.tar"
            with RawTarWriter(tar) as writer:
                for name, caption in captions.items():
                    writer.write(f"{archive}/{name}", picture(name), caption)
            ledger = Ledger(
                dataset=self.spec.slug,
                archive=archive,
                stage="raw",
                read=len(captions) + sum(map(len, keys.values())),
                kept=len(captions),
                rejected=keys,
                bytes_in=1,
                bytes_out=0,
                seconds=0.0,
                source={"name": archive, "content_id": "c", "revision": "r"},
                inputs={"archive": "c"},
                settings=raw_settings(ImageSettings()),
                versions={},
                files=(),
                details={"stored_unchanged": 0, "orphan_captions": orphans},
            )
            publish(stage_dir, tar, with_files(ledger, (writer.output_file(f"{archive}.tar"),)))

    def mds(self, archive: str, images: ImageSettings | None = None) -> Ledger:
        """Run the mds stage; its ledger always balances."""
        ledger = convert_archive(self.spec, archive, self.root, images or ImageSettings()).ledger
        assert ledger.balances
        return ledger

    def captions(self, archive: str) -> dict[str, Any]:
        """What mds published: captions by the sample's name."""
        rows = iter_rows(self.root.mds(self.spec.slug).data(archive))
        return {row["key"].removeprefix(f"{archive}/"): row["caption"] for row in rows}


def picture(name: str) -> StoredImage:
    """What raw stores of a sample, for stages that do not look at it."""
    return StoredImage(name.encode(), 300, 300, 300, 300, "jpeg", True)
