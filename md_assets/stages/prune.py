"""prune: remove raw and mds of archives whose latents are verified. The ledgers stay, marked, and with them the counts.

An archive is pruned while all its workspaces are held, so never while somebody works on it, in this order: its latents
are verified; its raw and mds ledgers are marked; its shards leave the merged indexes; its data are removed. Readers
take a marked archive's data for absent, so whatever moment a run is killed at, a repeated one finishes what it began.

Here: which archives, and the order. Not here: the checks (`stages.verify`), what a mark means (`core.ledger`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.spec import DatasetSpec
from md_assets.stages.index import drop_from_index
from md_assets.stages.status import stages_of
from md_assets.stages.verify import counts_balance, verify_archive
from md_assets.storage.publish import BusyError, is_busy, read_ledger, workspace, write_atomically

BATCH_ARCHIVES = 32
"""Archives that are pruned together, because each batch rewrites the merged indexes: few enough that their locks, some
eight for each, fit into the usual limit of 1,024 open files."""

KEPT_ARCHIVES = "archives"
"""What a report calls the upstream archives that `keep_archives` left."""


@dataclass(frozen=True)
class KeptBack:
    """An archive that has raw or mds and is not pruned.

    Attributes:
        archive: its ID.
        why: for people; the same for all archives of the same case.
        failed: whether something is wrong with the archive, rather than just not done yet.
    """

    archive: str
    why: str
    failed: bool


@dataclass(frozen=True)
class PruneReport:
    """What was removed from a dataset, or would be.

    Attributes:
        dataset: slug.
        dry_run: whether nothing was changed.
        archives, bytes: by the stage's directory below the dataset's, e.g. `mds`.
        kept_back: what stays.
    """

    dataset: str
    dry_run: bool
    archives: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    kept_back: list[KeptBack] = field(default_factory=list)

    def kept_back_groups(self) -> dict[str, list[str]]:
        """Why -> the archives that stay for it."""
        groups: dict[str, list[str]] = {}
        for kept in self.kept_back:
            groups.setdefault(kept.why, []).append(kept.archive)
        return groups

    @property
    def failed(self) -> bool:
        return any(kept.failed for kept in self.kept_back)


def prune_dataset(
    spec: DatasetSpec, root: DataRoot, encoder_tag: str, *, dry_run: bool, report: ReportProgress = silent
) -> PruneReport:
    """Remove raw, mds, mds of subsets and kept upstream archives of those archives whose latents are verified.

    Args:
        spec, root: which dataset.
        encoder_tag: whose latents must be there; every byte of them is read and compared. Where the dataset has
            subsets, their latents too.
        dry_run: tell what would be removed, and change nothing.
        report: told of archives looked at.

    May be repeated and killed at any time. Nothing outside the data root is touched: an archive of which something is
    a symbolic link, or lies behind one, is kept back.
    """
    pruning = _Pruning(spec, root, encoder_tag, dry_run)
    candidates = [archive for archive in spec.archives if any(pruning.things(archive))]
    for start in range(0, len(candidates), BATCH_ARCHIVES):
        batch = candidates[start : start + BATCH_ARCHIVES]
        pruning.prune(batch, partial(_tell, report, spec.slug, len(candidates), start))
    return pruning.report


def _tell(report: ReportProgress, dataset: str, total: int, before: int, done: int) -> None:
    report(Progress(dataset, "verifies latents", before + done, total, "archives"))


class _Refused(Exception):
    """The archive stays."""

    def __init__(self, why: str, failed: bool = False) -> None:
        self.why, self.failed = why, failed
        super().__init__(why)


class _Pruning:
    """One run over a dataset."""

    def __init__(self, spec: DatasetSpec, root: DataRoot, encoder_tag: str, dry_run: bool) -> None:
        self.report = PruneReport(spec.slug, dry_run)
        self._spec, self._root, self._dry_run = spec, root, dry_run
        self._stages = stages_of(root, spec)
        self._doomed = [(stage_dir, upstream) for stage_dir, upstream in self._stages if stage_dir.stage != "latents"]
        wanted = [root.latents(spec.slug, encoder_tag, name) for name in ("", *(s.name for s in spec.subsets))]
        self._latents = [(wanted[0], root.mds(spec.slug)), *((latents, wanted[0]) for latents in wanted[1:])]
        self._kept_archives = _kept_archives(spec, root)
        self._real_root = root.path.resolve()

    def things(self, archive: str) -> Iterator[tuple[str, StageDir, Path]]:
        """What is there to be removed: what to call it, the stage whose ledger tells of it, the path."""
        for stage_dir, _ in self._doomed:
            if os.path.lexists(path := stage_dir.data(archive)):
                yield stage_dir.path.name, stage_dir, path
        if kept := self._kept_archives.get(archive):
            yield KEPT_ARCHIVES, self._doomed[0][0], kept

    def prune(self, archives: Sequence[str], looked_at: Callable[[int], None]) -> None:
        """Prune those of the archives that may be."""
        with ExitStack() as held:
            ready: dict[str, dict[Path, Path]] = {}
            for number, archive in enumerate(archives):
                looked_at(number)
                try:
                    with ExitStack() as own:
                        self._refuse_unencoded(archive)
                        self._refuse_symlinks(archive)
                        workspaces = self._hold(archive, own)
                        if not self._is_begun(archive):
                            self._refuse_unverified(archive)
                        held.enter_context(own.pop_all())
                        ready[archive] = workspaces
                except _Refused as refused:
                    self.report.kept_back.append(KeptBack(archive, refused.why, refused.failed))
                except MdAssetsError as error:  # a damaged ledger
                    self.report.kept_back.append(KeptBack(archive, str(error), failed=True))
            if not self._dry_run:
                for archive, workspaces in ready.items():
                    self._mark(archive, workspaces)
                self._drop_from_indexes(ready)
            for archive in ready:
                self._remove(archive)

    def _refuse_unencoded(self, archive: str) -> None:
        for latents, _ in self._latents:
            if not latents.ledger(archive).exists():
                raise _Refused(f"its {latents.asset} are not published ({latents.path.name})")

    def _refuse_symlinks(self, archive: str) -> None:
        paths = [path for stage_dir, _ in self._stages for path in (stage_dir.ledger(archive), stage_dir.data(archive))]
        paths += [stage_dir.index(self._spec.split_of(archive)) for stage_dir, _ in self._doomed]
        paths += [path for _, _, path in self.things(archive)]
        for path in paths:
            if path.resolve() != self._real_root / path.relative_to(self._root.path):
                raise _Refused(f"{path} is a symbolic link, or lies behind one: remove it by hand", failed=True)

    def _hold(self, archive: str, own: ExitStack) -> dict[Path, Path]:
        """Take the archive's workspace in every stage, of every pair of encoders; ledger -> workspace."""
        held = {}
        for ledger in (stage_dir.ledger(archive) for stage_dir, _ in self._stages):
            try:
                if self._dry_run and is_busy(ledger):
                    raise BusyError
                if not self._dry_run and ledger.parent.is_dir():
                    held[ledger] = own.enter_context(workspace(ledger, wait=False))
            except BusyError:
                raise _Refused("another run works on it") from None
        return held

    def _is_begun(self, archive: str) -> bool:
        """Whether an earlier run marked all that is left, and was killed before it removed it."""
        ledgers = [read_ledger(stage_dir.ledger(archive)) for _, stage_dir, _ in self.things(archive)]
        return all(ledger is not None and ledger.pruned is not None for ledger in ledgers)

    def _refuse_unverified(self, archive: str) -> None:
        raw, mds = self._root.raw(self._spec.slug), self._root.mds(self._spec.slug)
        for stage_dir, upstream in ((raw, None), (mds, raw)):
            if not (balance := counts_balance(stage_dir, archive, upstream)).passed:
                raise _Refused(f"{stage_dir.path.name}: {balance.what}", failed=True)
        for latents, upstream in self._latents:
            for verdict in verify_archive(latents, upstream, archive):
                if not verdict.passed:
                    raise _Refused(f"{latents.path.name}: {verdict.check}: {verdict.what}", failed=True)
        for stage_dir, upstream in ((mds, raw), *self._latents):
            ledger, before = (read_ledger(directory.ledger(archive)) for directory in (stage_dir, upstream))
            if ledger is None or before is None or ledger.inputs.get(upstream.stage) != before.content_id:
                what = f"{stage_dir.path.name} was made of another {upstream.path.name}"
                raise _Refused(f"{what}: materialize {self._spec.slug}/{stage_dir.asset} of it again")

    def _mark(self, archive: str, workspaces: Mapping[Path, Path]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        freed: Counter[StageDir] = Counter()
        for _, stage_dir, path in self.things(archive):
            freed[stage_dir] += _size_bytes(path)
        for stage_dir, _ in self._doomed:
            path = stage_dir.ledger(archive)
            ledger: Ledger | None = read_ledger(path)
            if ledger is not None and ledger.pruned is None:
                marked = replace(ledger, pruned=Pruned(now, freed[stage_dir]))
                write_atomically(path, marked.to_json().encode(), workspaces[path])

    def _drop_from_indexes(self, archives: Mapping[str, object]) -> None:
        for stage_dir, _ in self._doomed:
            for split in dict.fromkeys(map(self._spec.split_of, archives)):
                if stage_dir.stage == "mds" and stage_dir.index(split).parent.is_dir():
                    drop_from_index(stage_dir, split, [a for a in archives if self._spec.split_of(a) == split])

    def _remove(self, archive: str) -> None:
        for name, _, path in list(self.things(archive)):
            self.report.archives[name] += 1
            self.report.bytes[name] += _size_bytes(path)
            if self._dry_run:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _kept_archives(spec: DatasetSpec, root: DataRoot) -> dict[str, Path]:
    """The upstream archives that are kept, by ID; their suffix is that of their name at the source."""
    without_suffix = {archive: root.kept_archive(spec.slug, archive, "") for archive in spec.archives}
    folders = {path.parent for path in without_suffix.values() if path.parent.is_dir()}
    found = {path.with_suffix(""): path for folder in folders for path in folder.iterdir() if not path.is_dir()}
    return {archive: found[path] for archive, path in without_suffix.items() if path in found}


def _size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
