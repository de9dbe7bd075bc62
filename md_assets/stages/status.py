"""status: what is published, stale, pruned or missing, told from the ledgers on disk.

Ledgers are read for their numbers alone: whether one was edited by hand is for `stages.verify` to find.

Here: reading and adding up. Not here: showing it (`terminal`), why an archive is stale (`stages.stale`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, LedgerNumbers
from md_assets.core.paths import DataRoot, Stage, StageDir
from md_assets.core.settings import FORMAT_VERSION
from md_assets.core.spec import DatasetSpec
from md_assets.stages.once import recorded
from md_assets.stages.stale import Difference, StaleGroup, WantedSettings, changed_inputs, differing_settings
from md_assets.storage.publish import read_numbers

INDEXED_STAGES: tuple[Stage, ...] = ("mds", "latents")
"""Stages that have merged indexes."""


@dataclass(frozen=True)
class StageTotals:
    """One stage of one dataset: `archives = done + failed + stale + pruned + missing`.

    Attributes:
        stage: the stage's directory below the dataset's, e.g. `mds_latents_sdxl1_dfnclipH14`.
        archives: all of the dataset.
        done: published, with the settings wanted and from the inputs of now.
        stale: published, but not so.
        pruned: removed on purpose.
        missing: not published, or not whole.
        read, kept: samples of all that have a ledger.
        rejected: the same, by reason.
        bytes_out: published bytes that are there.
        bytes_freed: bytes that were pruned.
        seconds: of work.
        stale_groups: why archives are stale.
        failed: last failed, as Dagster's records say, whatever is published of them; None where these are not known.
    """

    stage: str
    archives: int = 0
    done: int = 0
    stale: int = 0
    pruned: int = 0
    missing: int = 0
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bytes_out: int = 0
    bytes_freed: int = 0
    seconds: float = 0.0
    stale_groups: tuple[StaleGroup, ...] = ()
    failed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For scripts: these keys stay. Each of `stale_because` has a `setting` or an `input`, and its archives."""
        because = []
        for group in self.stale_groups:
            difference = group.difference
            if difference.is_input:
                what: dict[str, Any] = {"input": difference.what.partition(" ")[2]}
            else:
                what = {"setting": difference.what, "found": difference.found, "wanted": difference.wanted}
            because.append({**what, "archives": list(group.archives)})
        counts = ("archives", "done", "failed", "stale", "pruned", "missing", "read", "kept")
        return {
            "stage": self.stage,
            **{name: getattr(self, name) for name in counts},
            "rejected": dict(sorted(self.rejected.items())),
            "bytes": self.bytes_out,
            "bytes_freed": self.bytes_freed,
            "seconds": round(self.seconds, 3),
            "stale_because": because,
        }


def stages_of(root: DataRoot, spec: DatasetSpec) -> list[tuple[StageDir, StageDir | None]]:
    """The stages of a dataset and what each reads, in an order in which that comes first.

    Latents are there once for each pair of encoders that has a directory.
    """
    slug = spec.slug
    names = ["", *(subset.name for subset in spec.subsets)]
    raw, mds = root.raw(slug), root.mds(slug)
    stages: list[tuple[StageDir, StageDir | None]] = [(raw, None), (mds, raw)]
    stages += [(root.mds(slug, name), mds) for name in names[1:]]
    prefixes = [root.latents(slug, "", name).path.name for name in names]
    folders = [path.name for path in (root.path / slug).glob("mds_*") if path.is_dir()]
    for tag in sorted({name[len(prefix) :] for prefix in prefixes for name in folders if name.startswith(prefix)}):
        latents = root.latents(slug, tag)
        stages.append((latents, mds))
        stages += [(root.latents(slug, tag, name), latents) for name in names[1:]]
    return stages


def stage_dirs(root: DataRoot, spec: DatasetSpec) -> list[StageDir]:
    """The stages of a dataset, see `stages_of`."""
    return [stage_dir for stage_dir, _ in stages_of(root, spec)]


def recorded_ledgers(spec: DatasetSpec, stage_dir: StageDir) -> Iterator[Ledger]:
    """The ledgers of a stage's published and pruned archives, in upstream's order."""
    for archive in spec.archives:
        ledger = recorded(stage_dir, archive)
        if ledger is not None:
            yield ledger


def dataset_totals(
    spec: DatasetSpec,
    root: DataRoot,
    wanted: WantedSettings,
    failed: Mapping[str, Collection[str]] | None = None,
    observed: Mapping[str, str] | None = None,
) -> list[StageTotals]:
    """The totals of each stage of a dataset, and of what it has beside its archives.

    Args:
        wanted: archives made with other settings are stale, like those whose upstream has another content now.
        failed: a stage's directory -> archives that failed there last; None where that is not known.
        observed: archive -> content id that its source had when it was observed last, as far as that is known.
    """
    totals = []
    contents: dict[Path, dict[str, str]] = {}
    annotations = _annotation_contents(spec, root)
    for stage_dir, upstream in stages_of(root, spec):
        of_stage = None if failed is None else failed.get(stage_dir.path.name, ())
        adding = _Adding(stage_dir, wanted.of(spec, stage_dir), of_stage)
        contents[stage_dir.path] = here = {}
        before = contents[upstream.path] if upstream else {}
        for archive in spec.archives:
            now: dict[str, str] = {}
            if upstream and archive in before:
                now[upstream.stage] = before[archive]
            if upstream is None and observed and archive in observed:
                now["archive"] = observed[archive]
            source = spec.annotation_of(archive) if stage_dir.stage == "mds" else None
            if source and source.name in annotations:
                now["annotations"] = annotations[source.name]
            if numbers := adding.add(archive, now):
                here[archive] = numbers.content_id
        totals.append(adding.totals(stage_dir.path.name, len(spec.archives)))
    for asset in dict.fromkeys(extra.asset for extra in spec.raw_only):
        totals.append(_beside(spec, root, wanted, asset))
    return totals


def _beside(spec: DatasetSpec, root: DataRoot, wanted: WantedSettings, asset: str) -> StageTotals:
    """Of what is only fetched."""
    extras = [extra for extra in spec.raw_only if extra.asset == asset]
    raw = root.raw(spec.slug)
    images = _Adding(raw, wanted.of(spec, raw))
    lines = _Adding(raw, {"format_version": FORMAT_VERSION})
    for extra in extras:
        (images if extra.images else lines).add(extra.name, {})
    lines.merge(images)
    return lines.totals(asset, len(extras))


def _annotation_contents(spec: DatasetSpec, root: DataRoot) -> dict[str, str]:
    found = {}
    for source in spec.annotations:
        numbers = whole_numbers(root.annotations(spec.slug), source.name)
        if numbers:
            found[source.name] = numbers.content_id
    return found


class _Adding:
    """Adds up the ledgers of a stage.

    Args:
        stage_dir: where they are.
        wanted: the settings.
        failed: archives that failed last; None where that is not known.
    """

    def __init__(self, stage_dir: StageDir, wanted: Mapping[str, Any], failed: Collection[str] | None = None) -> None:
        self._stage_dir = stage_dir
        self._wanted = wanted
        self._failed = failed
        self._differences: dict[str, tuple[Difference, ...]] = {}
        self._stale: dict[str, tuple[Difference, list[str]]] = {}
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._seconds = 0.0

    def add(self, archive: str, inputs_now: Mapping[str, str]) -> LedgerNumbers | None:
        """Add an archive, if it is there."""
        numbers = whole_numbers(self._stage_dir, archive)
        if numbers is None:
            return None
        differences = self._of_settings(numbers) + changed_inputs(numbers.inputs, inputs_now)
        state = "pruned" if numbers.pruned else "stale" if differences else "done"
        if archive in (self._failed or ()):
            state = "failed"
        if state == "stale":
            for difference in differences:
                self._stale.setdefault(repr(difference), (difference, []))[1].append(archive)
        counts = self._counts
        counts[state] += 1
        counts["read"] += numbers.read
        counts["kept"] += numbers.kept
        counts["bytes_out"] += 0 if numbers.pruned else numbers.bytes_out
        counts["bytes_freed"] += numbers.pruned.bytes_freed if numbers.pruned else 0
        for reason, count in numbers.rejected.items():
            self._rejected[reason] += count
        self._seconds += numbers.seconds
        return numbers

    def _of_settings(self, numbers: LedgerNumbers) -> tuple[Difference, ...]:
        """In what the settings differ; told once for all archives of the same."""
        if numbers.fingerprint not in self._differences:
            self._differences[numbers.fingerprint] = differing_settings(numbers.settings, self._wanted)
        return self._differences[numbers.fingerprint]

    def merge(self, other: _Adding) -> None:
        self._counts += other._counts
        self._rejected += other._rejected
        self._seconds += other._seconds
        for name, (difference, archives) in other._stale.items():
            self._stale.setdefault(name, (difference, []))[1].extend(archives)

    def totals(self, stage: str, archives: int) -> StageTotals:
        """What was added.

        Args:
            stage: what to call it.
            archives: how many there are in all.
        """
        failed = None if self._failed is None else len(self._failed)  # with those that have no ledger
        counts: dict[str, Any] = {**self._counts, "failed": failed}
        found = sum(self._counts[state] for state in ("done", "stale", "pruned")) + (failed or 0)
        groups = tuple(StaleGroup(difference, tuple(ids)) for difference, ids in self._stale.values())
        return StageTotals(
            stage=stage,
            archives=archives,
            missing=archives - found,
            rejected=self._rejected,
            seconds=self._seconds,
            stale_groups=groups,
            **counts,
        )


def whole_numbers(stage_dir: StageDir, archive: str) -> LedgerNumbers | None:
    """The numbers of an archive that is published or pruned; see `stages.once.recorded`."""
    try:
        numbers = read_numbers(stage_dir.ledger(archive))
    except MdAssetsError:
        return None
    if numbers is None or numbers.pruned:
        return numbers
    folder = os.fspath(stage_dir.path)
    for path, size in numbers.files.items():
        try:
            if os.stat(f"{folder}/{path}").st_size != size:  # noqa: PTH116 (a Path for each of 100,000 files takes a second)
                return None
        except OSError:
            return None
    return numbers
