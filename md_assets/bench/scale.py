"""What orchestration costs at scale: a backfill of thousands of archives whose stages do no work, with real services.

A code server, the daemon and the webserver run as an installation runs them, on the committed `dagster.yaml`; so the
daemon's own intervals (30 s between looks at a backfill, 5 s between looks at the queue) are part of what is measured.

Here: the measurements and what they are held to. Not here: the assets (`bench.no_op_stages`), the services
(`bench.dagster_services`), PostgreSQL (`bench.postgres_server`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md_assets.bench.dagster_services import Service, answers, ask, code_server, daemon, free_port, started, webserver
from md_assets.bench.postgres_server import postgres_server
from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.core.paths import ARCHIVE_STAGES, DATA_ROOT_VARIABLE, DataRoot
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.spec import DatasetSpec

if TYPE_CHECKING:
    import dagster as dg

STORAGES = {"sqlite": "dagster.yaml", "postgres": "dagster.postgres.yaml"}
"""What keeps Dagster's records -> its file in `deploy`."""

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

LOCATION = "md_assets.bench.scale_location"

PER_ARCHIVE_STAGE_LIMIT_S, GROWTH_LIMIT = 0.25, 1.2
PASSED_OVER_LIMIT_MS, PARTITIONS_LIMIT_S, STATUS_LIMIT_S, TICK_LIMIT_S = 10.0, 2.0, 5.0, 30.0
"""What the platform is held to, see `docs/benchmarks.md`."""

POLL_S = 2.0

TICKS = 2
"""Ticks of the audit that are measured, from the first archive on."""

READS = 500
"""Archives that are passed over, evenly spread."""

PARTITIONS_QUERY = """
query PartitionHealthQuery($assetKey: AssetKeyInput!) {
  assetNodeOrError(assetKey: $assetKey) {
    ... on AssetNode {
      id
      partitionKeysByDimension { name type partitionKeys }
      assetPartitionStatuses {
        ... on DefaultPartitionStatuses { materializedPartitions materializingPartitions failedPartitions }
      }
    }
  }
}
"""
"""What an asset's page asks for its partitions (dagster-webserver 1.13), without what other kinds of them have."""


@dataclass(frozen=True)
class Range:
    """Values of something that was measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def worst(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class Figures:
    """One backfill, and what was measured on its result.

    Attributes:
        storage: see `STORAGES`.
        archives: how many, each in three stages.
        seconds: from launching the backfill to its end, merged indexes with it.
        runs: of each asset, by the last part of its key.
        run_s: of each stage, wall seconds of its runs from their start to their end.
        memory_mib: service -> resident memory when the backfill began, when it ended, and the most of all time.
        partitions_s: of the three stages' partition statuses together: the first time and the second.
        status_s: of `md-assets status`, process and all.
        ticks: of the audit: results stored, seconds.
        passed_over_ms: stage -> of passing over one archive.
        records_bytes: of Dagster's records; 0 where a server keeps them.
    """

    storage: str
    archives: int
    seconds: float
    runs: Mapping[str, int]
    run_s: Mapping[str, Range]
    memory_mib: Mapping[str, tuple[float, float, float]]
    partitions_s: tuple[float, float]
    status_s: float
    ticks: tuple[tuple[int, float], ...]
    passed_over_ms: Mapping[str, Range]
    records_bytes: int

    @property
    def per_archive_stage_s(self) -> float:
        """Wall seconds for each archive and stage."""
        return self.seconds / self.archives / len(ARCHIVE_STAGES)


def measure_all(
    archives: Sequence[int], storages: Sequence[str], per_run: int, folder: Path | None = None
) -> Iterator[Figures]:
    """Measure each number of archives on each storage, each time from nothing.

    Args:
        per_run: see `bench.no_op_stages.replace_work`.
        folder: takes everything for the time of a measurement, about 0.2 MB for each archive; the system's own for
            temporary files by default.

    Raises:
        SettingsError: a number or storage cannot be measured, or this is not a checkout.
    """
    from md_assets.datasets.diffdb import ARCHIVES

    if unknown := [storage for storage in storages if storage not in STORAGES]:
        raise SettingsError(f"there is no storage {unknown[0]!r}", f"Choose of {', '.join(STORAGES)}")
    if not all(0 < count <= ARCHIVES for count in archives) or per_run < 0:
        raise SettingsError(f"cannot measure {archives} archives, {per_run} in a run", f"1 to {ARCHIVES:,}")
    if not DEPLOY.is_dir():
        raise SettingsError(f"{DEPLOY} with Dagster's configuration is missing", "Run it from a checkout")
    for count in archives:
        for storage in storages:
            with tempfile.TemporaryDirectory(prefix="md_assets-scale-", dir=folder) as own:
                yield measure(Path(own), storage, count, per_run)


def measure(folder: Path, storage: str, archives: int, per_run: int) -> Figures:
    """One measurement, in an empty folder."""
    from md_assets.bench.no_op_stages import ARCHIVES_VARIABLE, PER_RUN_VARIABLE, spec_of_scale, write_templates

    spec, root, home = spec_of_scale(archives), DataRoot(folder / "datadir"), folder / "dagster_home"
    home.mkdir()
    shutil.copyfile(DEPLOY / STORAGES[storage], home / "dagster.yaml")
    environment = {
        DATA_ROOT_VARIABLE: str(root.path),
        "DAGSTER_HOME": str(home),
        "PYTHONPATH": str(DEPLOY.parent),
        ARCHIVES_VARIABLE: str(archives),
        PER_RUN_VARIABLE: str(per_run),
        **write_templates(root, spec),
    }
    with contextlib.ExitStack() as stack:
        if storage == "postgres":
            environment |= stack.enter_context(postgres_server())
        stack.enter_context(_variables(environment))
        return _measured(folder, storage, spec, root)


def _measured(folder: Path, storage: str, spec: DatasetSpec, root: DataRoot) -> Figures:
    import dagster as dg

    from md_assets.orchestration.backfills import a_daemon_runs

    code_port, port = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(dg.DagsterInstance.get())  # makes its tables before two services try the same

        def start(name: str, command: Sequence[str], ready: Callable[[], bool]) -> Service:
            service = stack.enter_context(started(name, command, folder, {}))
            service.wait_until(ready)
            return service

        services = [start("code server", code_server(LOCATION, code_port), lambda: answers(code_port))]
        services.append(start("daemon", daemon(code_port), lambda: a_daemon_runs(instance)))
        services.append(start("webserver", webserver(code_port, port), lambda: answers(port)))
        before = {service.name: service.memory().now_mib for service in services}
        seconds, runs = _backfill(instance, spec, services)
        partitions_s = (_partitions_s(port, spec), _partitions_s(port, spec))
        memory = {service.name: service.memory() for service in services}
        by_asset: dict[str, list[dg.RunRecord]] = {}
        for record in runs:
            for key in record.dagster_run.asset_selection or ():
                by_asset.setdefault(key.path[-1], []).append(record)
        return Figures(
            storage=storage,
            archives=len(spec.archives),
            seconds=seconds,
            runs={asset: len(records) for asset, records in by_asset.items()},
            run_s={stage: Range(tuple(map(_run_s, by_asset[stage]))) for stage in ARCHIVE_STAGES},
            memory_mib={name: (before[name], now.now_mib, now.peak_mib) for name, now in memory.items()},
            partitions_s=partitions_s,
            status_s=_status_s(spec),
            ticks=tuple(audit_ticks(instance, spec, root, TICKS)),
            passed_over_ms=passed_over_ms(spec, root),
            records_bytes=sum(path.stat().st_size for path in root.path.with_name("dagster_home").rglob("*.db*")),
        )


def _backfill(instance: dg.DagsterInstance, spec: DatasetSpec, services: Sequence[Service]) -> tuple[float, list[Any]]:
    """Take all archives through all stages; returns seconds and the records of its runs.

    Raises:
        MdAssetsError: not everything was done, or a service has ended.
    """
    import dagster as dg
    from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus
    from dagster._core.storage.tags import BACKFILL_ID_TAG

    from md_assets.bench.no_op_stages import definitions
    from md_assets.orchestration.backfills import plan_backfill

    if spec.annotations:  # they are not what is measured
        captions = dg.AssetMaterialization(dg.AssetKey([spec.slug, "annotations"]))
        instance.report_runless_asset_event(captions)
    asset_graph = definitions(spec).resolve_asset_graph()
    backfill_id = plan_backfill(instance, asset_graph, spec, spec.archives).launch(instance, asset_graph)
    while True:
        time.sleep(POLL_S)
        for service in services:
            service.check()
        backfill = instance.get_backfill(backfill_id)
        if backfill is not None and backfill.status in BULK_ACTION_TERMINAL_STATUSES:
            break
    done = Counter({stage: len(instance.get_materialized_partitions(_key(spec, stage))) for stage in ARCHIVE_STAGES})
    if backfill.status is not BulkActionStatus.COMPLETED_SUCCESS or set(done.values()) != {len(spec.archives)}:
        raise MdAssetsError(f"the backfill ended as {backfill.status.value}: {dict(done)} of {len(spec.archives)}")
    assert backfill.backfill_end_timestamp is not None
    runs = instance.get_run_records(dg.RunsFilter(tags={BACKFILL_ID_TAG: backfill_id}))
    return backfill.backfill_end_timestamp - backfill.backfill_timestamp, list(runs)


def _partitions_s(port: int, spec: DatasetSpec) -> float:
    """Seconds of asking for the partitions of all three stages, one after the other."""
    began = time.perf_counter()
    for stage in ARCHIVE_STAGES:
        answer = ask(port, PARTITIONS_QUERY, assetKey={"path": [spec.slug, stage]})
        found = answer["assetNodeOrError"]["assetPartitionStatuses"]["materializedPartitions"]
        if len(found) != len(spec.archives):
            raise MdAssetsError(f"the UI shows {len(found)} of {len(spec.archives)} archives of {stage}")
    return time.perf_counter() - began


def _status_s(spec: DatasetSpec) -> float:
    """Seconds of `md-assets status`, the median of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "md_assets.cli", "status", spec.slug], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def audit_ticks(
    instance: dg.DagsterInstance, spec: DatasetSpec, root: DataRoot, ticks: int, **limits: float
) -> Iterator[tuple[int, float]]:
    """Ticks of the sensor `audit` on a fresh cursor: results stored (for an archive of mds and latents one each) and
    seconds.

    Args:
        limits: of `orchestration.audit.Audit`, where they are to differ.

    Raises:
        MdAssetsError: it finds a fault.
    """
    import dagster as dg

    from md_assets.core.verdict import AUDITED
    from md_assets.orchestration.audit import Audit, Cursor

    def stored() -> int:
        keys = [dg.AssetCheckKey(_key(spec, stage), AUDITED) for stage in ("mds", "latents")]
        found = instance.event_log_storage.get_asset_check_partition_info(keys)
        return sum(one.latest_execution_status.value != "PLANNED" for one in found)

    cursor, before = Cursor(), stored()
    for _ in range(ticks):
        began = time.perf_counter()
        audit = Audit(instance, [spec], root, cursor, **limits)
        audit.run()
        seconds = time.perf_counter() - began
        if audit.faults:
            raise MdAssetsError(f"the audit finds {len(audit.faults)} faults, the first: {audit.faults[0]}")
        cursor, now = audit.cursor, stored()
        yield now - before, seconds
        before = now


def passed_over_ms(spec: DatasetSpec, root: DataRoot) -> dict[str, Range]:
    """Milliseconds of the real stages for archives that are published, by stage.

    Raises:
        MdAssetsError: one is not passed over.
    """
    from md_assets.bench.no_op_stages import NoHubResource
    from md_assets.orchestration.resources import EncodersResource
    from md_assets.stages.latents import LatentsPlan
    from md_assets.stages.mds import convert_archive
    from md_assets.stages.raw import fetch_archive
    from md_assets.storage.image_pool import ImagePool

    images, hub, encoders = ImageSettings(), NoHubResource(), EncodersResource()
    sources, pool = hub.sources(), ImagePool(0)
    mds = mds_settings(spec, images)
    plan = LatentsPlan(str(root.path), spec.slug, (), mds, encoders.settings(hub.client()), encoders.tag())

    def raw(archive: str) -> bool:
        locate = spec.locate(archive)
        return fetch_archive(
            spec, archive, lambda: sources.locate(locate), root, images, fetcher=sources, pool=pool
        ).passed_over

    stages: dict[str, Callable[[str], bool]] = {
        "raw": raw,
        "mds": lambda archive: convert_archive(spec, archive, root, images).passed_over,
        "latents": lambda archive: plan.current(archive) is not None,
    }
    chosen = spec.archives[:: max(len(spec.archives) // READS, 1)]
    found = {}
    for stage, passes_over in stages.items():
        took_ms = []
        for archive in chosen:
            began = time.perf_counter()
            if not passes_over(archive):
                raise MdAssetsError(f"{spec.slug} {archive}: {stage} is published, but was not passed over")
            took_ms.append((time.perf_counter() - began) * 1000)
        found[stage] = Range(tuple(took_ms))
    return found


def report(figures: Figures) -> str:
    """What was measured, in lines, each with what it is held to."""
    f = figures
    memory = ", ".join(f"{name} {a:.0f} → {b:.0f} (most {c:.0f})" for name, (a, b, c) in f.memory_mib.items())
    runs = ", ".join(f"{asset} {count}" for asset, count in f.runs.items())
    stages = ", ".join(
        f"{stage} {f.run_s[stage].median:.1f} s ({sum(f.run_s[stage].values) / f.archives:.3f} s for each archive)"
        for stage in ARCHIVE_STAGES
    )
    passed = ", ".join(f"{stage} {ms.median:.1f} (worst {ms.worst:.1f})" for stage, ms in f.passed_over_ms.items())
    ticks = ", ".join(f"{results} results in {seconds:.1f} s" for results, seconds in f.ticks)
    lines = [
        f"{f.archives:,} archives, {f.storage}: backfill of three stages in {f.seconds:,.0f} s, "
        f"{f.per_archive_stage_s:.3f} s for each archive and stage (limit {PER_ARCHIVE_STAGE_LIMIT_S})",
        f"runs: {runs}; medians from start to end: {stages}",
        f"memory, MiB: {memory}",
        f"partition statuses of three assets: {f.partitions_s[0]:.2f} s, again {f.partitions_s[1]:.2f} s "
        f"(limit {PARTITIONS_LIMIT_S:.0f}); md-assets status: {f.status_s:.1f} s (limit {STATUS_LIMIT_S:.0f})",
        f"ticks of the audit: {ticks} (limit {TICK_LIMIT_S:.0f} s)",
        f"passing over, ms: {passed} (limit {PASSED_OVER_LIMIT_MS:.0f})",
    ]
    return "\n  ".join(lines + ([f"Dagster's records: {f.records_bytes / 1e6:,.0f} MB"] if f.records_bytes else []))


def report_growth(figures: Sequence[Figures]) -> str:
    """How the time for an archive and stage grows from the fewest archives of a storage to more, in lines."""
    lines = []
    for storage in dict.fromkeys(f.storage for f in figures):
        first, *others = sorted((f for f in figures if f.storage == storage), key=lambda f: f.archives)
        for more in others:
            growth = more.per_archive_stage_s / first.per_archive_stage_s
            lines.append(
                f"{storage}, {more.archives:,} archives: {growth:.2f} times the time for each of {first.archives:,} "
                f"(limit {GROWTH_LIMIT})"
            )
    return "\n".join(lines)


def _key(spec: DatasetSpec, name: str) -> dg.AssetKey:
    import dagster as dg

    return dg.AssetKey([spec.slug, name])


def _run_s(record: Any) -> float:
    return float(record.end_time - record.start_time)


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
