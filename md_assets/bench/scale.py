"""What orchestration costs at scale: a backfill of thousands of archives whose stages do no work, with real services.

A code server, the daemon and the webserver run as an installation runs them, on the committed `dagster.yaml`; so the
daemon's own intervals (30 s between looks at a backfill, 5 s between looks at the queue) are part of what is measured.

Here: the measurements. Not here: how they are told (`bench.scale_report`), the assets (`bench.no_op_stages`), the
services (`bench.dagster_services`), PostgreSQL (`bench.postgres_server`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md_assets.bench.dagster_services import (
    Service,
    answers,
    ask,
    code_server,
    daemon,
    free_port,
    processor_s,
    started,
    webserver,
)
from md_assets.bench.postgres_server import postgres_server
from md_assets.bench.scale_report import Figures, Range
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

POLL_S = 2.0

TICKS = 2
"""Ticks of the audit that are measured, from the first archive on."""

ARCHIVES_PASSED_OVER = 64
"""In a run of a stage, whose archives are all published."""

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
        took_before = _processor_s(services)
        seconds, runs = _backfill(instance, spec, services)
        took = {name: now - took_before[name] for name, now in _processor_s(services).items()}
        partitions_s = _partitions_s(port, spec)
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
            processor_s={name: s for name, s in took.items() if s},
            memory_mib={name: (before[name], now.now_mib, now.peak_mib) for name, now in memory.items()},
            partitions_s=partitions_s,
            status_s=_status_s(spec),
            ticks=tuple(audit_ticks(instance, spec, root, TICKS)),
            passed_over_ms=passed_over_ms(spec, root),
            passed_over_in_run_ms=passed_over_in_run_ms(instance, spec),
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


def _processor_s(services: Sequence[Service]) -> dict[str, float]:
    """Processor seconds of all that this process has started: runs, which the code server starts, each service, and
    PostgreSQL where there is one."""
    whole = {service.name: processor_s(service.process.pid) for service in services}
    own = processor_s(services[0].process.pid, children=False)
    everything = processor_s(os.getpid()) - processor_s(os.getpid(), children=False)
    runs = {"runs": whole[services[0].name] - own}
    return {**runs, **whole, services[0].name: own, "PostgreSQL": everything - sum(whole.values())}


def _partitions_s(port: int, spec: DatasetSpec) -> dict[str, tuple[float, float]]:
    """Seconds of asking for the partitions of each stage, the first time and the second."""
    return {
        stage: (_partitions_once_s(port, spec, stage), _partitions_once_s(port, spec, stage))
        for stage in ARCHIVE_STAGES
    }


def _partitions_once_s(port: int, spec: DatasetSpec, stage: str) -> float:
    began = time.perf_counter()
    answer = ask(port, PARTITIONS_QUERY, assetKey={"path": [spec.slug, stage]})
    seconds = time.perf_counter() - began
    found = answer["assetNodeOrError"]["assetPartitionStatuses"]["materializedPartitions"]
    if len(found) != len(spec.archives):
        raise MdAssetsError(f"the UI shows {len(found)} of {len(spec.archives)} archives of {stage}")
    return seconds


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
    from md_assets.stages.latents_plan import LatentsPlan
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


def passed_over_in_run_ms(instance: dg.DagsterInstance, spec: DatasetSpec) -> dict[str, Range]:
    """Milliseconds from the record of one archive to that of the next, in a run of each stage in this process over
    archives that are published, by stage.

    Raises:
        MdAssetsError: a run fails.
    """
    import dagster as dg

    from md_assets.bench.no_op_stages import definitions

    job = definitions(spec).resolve_implicit_global_asset_job_def()
    first, last = spec.archives[0], spec.archives[:ARCHIVES_PASSED_OVER][-1]
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    found: dict[str, Range] = {}
    for stage in ARCHIVE_STAGES:
        of_stage = job.get_subset(asset_selection={_key(spec, stage)})
        with contextlib.redirect_stderr(io.StringIO()):
            run = of_stage.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
        if not run.success:
            raise MdAssetsError(f"a run over published archives of {stage} fails")
        stored = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        at_s = [entry.timestamp for entry in stored]
        found[stage] = Range(tuple((b - a) * 1000 for a, b in itertools.pairwise(at_s)))
    return found


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
