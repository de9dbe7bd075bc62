"""The sensor `audit`: what runs have published is read again from disk, and the check `audited` says what was found.

Here: what is due, in which order, for how long, and where results go. Not here: the reading itself (`stages.audit`).

What is due are the materializations of mds, latents, their subsets and merged indexes, in the order in which Dagster
stored them. A tick goes on where the one before ended: the cursor tells the newest one that was audited, and the newest
one whose bytes were hashed too, which takes longer and may lag behind.

Results are stored with the run that published the archive, in the place that this run planned for the check. (Dagster
can store a check without a run only once for each partition: a second one breaks a unique index.)
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.utils import make_new_run_id

from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import AUDITED, Verdict
from md_assets.datasets import all_specs
from md_assets.orchestration.archive_run import DATA_VERSION_TAG
from md_assets.orchestration.failed_checks import audited_keys
from md_assets.orchestration.records import kept_connection, stored_together

TICK_EVENTS = 1024
"""Materializations that a tick looks at: mds and latents of 500 archives are 1,000. SQLite takes some 190 results a
second (docs/benchmarks.md); where they are slower, `TICK_S` ends the tick."""

TICK_S = 20.0
"""For so long a tick audits; Dagster ends one after 60 s."""

HASH_AT_ONCE_S = 4.0
"""Until then a tick hashes the bytes of an archive together with its audit; of a larger number, afterwards."""

HASH_S = 25.0
"""Until then a tick hashes bytes that wait for it."""

INDEX_AHEAD_S = 8.0
"""A merged index is audited only in the beginning of a tick: one of 14,000 archives takes seconds."""

SETTLE_S = 10.0
"""Age of a materialization before it is audited: PostgreSQL may show a later one first, and the cursor would pass this
one."""

THREADS = 8
"""Archives that are read at a time: their ledgers may lie on a disk that is far away."""


@dataclass(frozen=True)
class Cursor:
    """Where the next tick goes on.

    Attributes:
        audited: storage id of the newest materialization that was audited.
        hashed: the same, of those whose bytes were hashed; not above `audited`.
        files: of the materialization after `hashed`, files that were hashed already.
    """

    audited: int = 0
    hashed: int = 0
    files: int = 0

    @classmethod
    def parse(cls, text: str | None) -> "Cursor":
        """The cursor of a sensor; that of a fresh one is before everything."""
        return cls(**json.loads(text)) if text else cls()

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Due:
    """One materialization that is to be audited.

    Attributes:
        storage_id: of its event.
        asset: e.g. `jdb/mds` or `jdb/mds_index`.
        archive: its partition; None of a merged index.
        run_id: of its run, empty for one that was reported by hand.
        timestamp: when, Unix time.
        path: where its run said that the ledger or the merged index is; empty where it did not say.
        said: content id, fingerprint and kept samples that its run recorded; None where it did not.
    """

    storage_id: int
    asset: dg.AssetKey
    archive: str | None
    run_id: str
    timestamp: float
    path: str
    said: tuple[str, str, int] | None

    @classmethod
    def of(cls, record: dg.EventLogRecord) -> "Due":
        """Told from its event."""
        materialization = record.asset_materialization
        assert materialization is not None
        told = {name: value.value for name, value in materialization.metadata.items()}
        version = (materialization.tags or {}).get(DATA_VERSION_TAG)
        fingerprint, kept = told.get("fingerprint"), told.get("kept")
        return cls(
            storage_id=record.storage_id,
            asset=materialization.asset_key,
            archive=materialization.partition,
            run_id=record.run_id,
            timestamp=record.timestamp,
            path=str(next((told[name] for name in told if name == "ledger" or name.endswith("index")), "")),
            said=(version, str(fingerprint), kept) if version and fingerprint and isinstance(kept, int) else None,
        )


@dg.sensor(
    name="audit",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Reads again from disk what mds, latents and merged indexes have published (ledgers of all stages, "
    "indexes, sizes, every 100th row, and in time all bytes) and stores what it finds as the check `audited` of each "
    "archive. It begins with what is there already.",
)
def audit_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick."""
    audit = Audit(context.instance, all_specs(), DataRoot.from_environment(), Cursor.parse(context.cursor))
    audit.run()
    for line in audit.faults:
        context.log.error(line)
    return dg.SensorResult(skip_reason=dg.SkipReason(audit.summary()), cursor=str(audit.cursor))


class Audit:
    """One tick of the audit.

    Args:
        instance: whose materializations.
        specs: the datasets.
        root: where they are.
        cursor: where the tick before ended.
        settle_s, tick_s, hash_s: see the constants of the same name.

    Attributes:
        cursor: where the next one goes on.
        faults: a line for each failed result.
    """

    def __init__(
        self,
        instance: dg.DagsterInstance,
        specs: Sequence[DatasetSpec],
        root: DataRoot,
        cursor: Cursor,
        *,
        settle_s: float = SETTLE_S,
        tick_s: float = TICK_S,
        hash_s: float = HASH_S,
    ) -> None:
        self._instance = instance
        self._specs = {spec.slug: spec for spec in specs}
        self._root = root
        self.cursor = cursor
        self._settle_s, self._tick_s, self._hash_s = settle_s, tick_s, hash_s
        self._began_s = time.monotonic()
        self._chains: dict[str, Mapping[str, tuple[StageDir, ...]]] = {}
        self._handmade_run_id = ""
        self._stored = self._hashed = self._passed_over = 0
        self.faults: list[str] = []

    def run(self) -> None:
        """Audit what is new, then hash what waits for it, until the time is up."""
        with kept_connection(self._instance):
            self._run()

    def _run(self) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            due = self._due(self.cursor.audited, TICK_EVENTS)
            for start in range(0, len(due), THREADS):
                with stored_together(self._instance):
                    for one, verdict in self._audited(due[start : start + THREADS], threads):
                        if verdict is _LATER:
                            return
                        self._take(one, verdict)
        while self._time_left(self._hash_s) and (waiting := self._due(self.cursor.hashed, THREADS)):
            for one in waiting:
                if one.storage_id > self.cursor.audited or not self._hash_late(one):
                    return

    def summary(self) -> str:
        """One line for people."""
        line = f"{self._stored:,} results stored, {len(self.faults):,} of them failed"
        line += f"; bytes of {self._hashed:,} archives hashed"
        line += f"; {self._passed_over:,} passed over, made again since" if self._passed_over else ""
        behind = self.cursor.hashed < self.cursor.audited
        return line + ("; bytes of others will be hashed by later ticks" if behind else "")

    # What is due

    def _due(self, after: int, limit: int) -> list[Due]:
        """The oldest materializations behind a storage id, at most `limit`, that have settled."""
        keys = audited_assets(self._specs.values())
        newest = {
            record.asset_entry.asset_key: record.asset_entry.last_materialization_storage_id or 0
            for record in self._instance.get_asset_records(keys)
        }
        found: list[Due] = []
        for key in keys:
            if newest.get(key, 0) > after:
                wanted = dg.AssetRecordsFilter(asset_key=key, after_storage_id=after)
                records = self._instance.fetch_materializations(wanted, limit=limit, ascending=True).records
                found += map(Due.of, records)
        found.sort(key=lambda due: due.storage_id)
        settled = time.time() - self._settle_s
        unsettled = next((n for n, due in enumerate(found) if due.timestamp > settled), len(found))
        return found[: min(limit, unsettled)]

    def _superseded(self, due: Due) -> bool:
        """Whether the archive or index was materialized again, so that it has its turn later."""
        partitions = None if due.archive is None else [due.archive]
        wanted = dg.AssetRecordsFilter(due.asset, asset_partitions=partitions, after_storage_id=due.storage_id)
        return bool(self._instance.fetch_materializations(wanted, limit=1).records)

    # Auditing

    def _audited(self, due: Sequence[Due], threads: ThreadPoolExecutor) -> Iterator[tuple[Due, "Verdict | None"]]:
        """The verdict on each, in order; None for what was made again, `_LATER` from where the time is up on."""
        if not self._time_left(self._tick_s):
            yield due[0], _LATER
            return
        archives = {one.storage_id: threads.submit(self._of_archive, one) for one in due if one.archive is not None}
        for one in due:
            if one.archive is not None:
                yield one, archives[one.storage_id].result()
            else:
                yield one, self._of_index(one) if self._time_left(INDEX_AHEAD_S) else _LATER

    def _of_archive(self, due: Due) -> Verdict | None:
        from md_assets.stages.audit import Said, audit_archive, state_of

        assert due.archive is not None
        chain = self._chain(due)
        if chain is None:
            what = f"its run recorded no ledger below {self._root.path}, but {due.path or 'none at all'}"
            return Verdict(AUDITED, False, what)
        before = state_of(chain, due.archive)
        verdict = audit_archive(chain, due.archive, Said(*due.said) if due.said else None)
        if not verdict.passed and (self._superseded(due) or before is None or before != state_of(chain, due.archive)):
            return None
        return verdict

    def _of_index(self, due: Due) -> Verdict | None:
        from md_assets.stages.audit import audit_index

        if self._superseded(due):
            return None
        spec = self._specs[due.asset.path[0]]
        run = self._instance.get_run_record_by_id(due.run_id) if due.run_id else None
        merged_s = run.start_time if run and run.start_time else due.timestamp
        stage = due.asset.path[-1].removesuffix("_index")
        chains = [chain[-1] for chain in self._chains_of(spec).values() if chain[-1].asset == stage]
        recorded = [step for step in chains if due.path.startswith(f"{step.path}/")]
        verdicts = [audit_index(step, spec, merged_s) for step in recorded or chains]
        failed = [verdict for verdict in verdicts if not verdict.passed]
        if not verdicts:
            return Verdict(AUDITED, False, f"there is no {stage} below {self._root.path / spec.slug}")
        return failed[0] if failed else verdicts[0]

    def _chain(self, due: Due) -> tuple[StageDir, ...] | None:
        """The stages behind the archive, by where its run said that its ledger is."""
        assert due.archive is not None
        for chain in self._chains_of(self._specs[due.asset.path[0]]).values():
            if chain[-1].asset == due.asset.path[-1] and str(chain[-1].ledger(due.archive)) == due.path:
                return chain
        return None

    def _chains_of(self, spec: DatasetSpec) -> Mapping[str, tuple[StageDir, ...]]:
        from md_assets.stages.audit import chain_to
        from md_assets.stages.status import stages_of

        if spec.slug not in self._chains:
            stages = stages_of(self._root, spec)
            self._chains[spec.slug] = {step.path.name: chain_to(stages, step) for step, _ in stages}
        return self._chains[spec.slug]

    # Hashing

    def _take(self, due: Due, verdict: Verdict | None) -> None:
        """An audited materialization: hash its bytes if none wait for that and there is time, then store the result."""
        cursor, at_once = self.cursor, self.cursor.hashed == self.cursor.audited
        files, complete = 0, True
        if verdict is not None and verdict.passed and due.archive is not None:
            verdict, files, complete = self._with_bytes(due, verdict, 0, HASH_AT_ONCE_S if at_once else 0)
        if verdict is None:
            self._passed_over += 1
        else:
            self._store(due, verdict)
        cursor = dataclasses.replace(cursor, audited=due.storage_id)
        if at_once:
            hashed = due.storage_id if complete else cursor.hashed
            cursor = dataclasses.replace(cursor, hashed=hashed, files=0 if complete else files)
        self.cursor = cursor

    def _hash_late(self, due: Due) -> bool:
        """Hash the bytes of what was audited before; whether they are all done."""
        if due.archive is not None and not self._superseded(due):
            verdict = self._of_archive(due)
            if verdict is not None and verdict.passed:
                verdict, files, complete = self._with_bytes(due, verdict, self.cursor.files, self._hash_s)
                if not complete:
                    self.cursor = dataclasses.replace(self.cursor, files=files)
                    return False
            if verdict is not None:
                self._store(due, verdict)
        self.cursor = dataclasses.replace(self.cursor, hashed=due.storage_id, files=0)
        return True

    def _with_bytes(self, due: Due, verdict: Verdict, start: int, until_s: float) -> tuple[Verdict | None, int, bool]:
        """The verdict with what hashing says; files that were hashed, and whether these are all.

        None for the verdict, if the archive was made again meanwhile.
        """
        from md_assets.stages.audit import hash_files, state_of

        chain = self._chain(due)
        assert chain is not None and due.archive is not None
        before = state_of(chain, due.archive)
        files, complete, fault = hash_files(chain, due.archive, start, lambda: self._time_left(until_s))
        if fault is not None:
            again = before is None or before != state_of(chain, due.archive)
            return (None if again else fault), files, True
        if not complete:
            return dataclasses.replace(verdict, what=f"{verdict.what}; its bytes will be hashed"), files, False
        self._hashed += 1
        return dataclasses.replace(verdict, what=f"{verdict.what}; the hashes of {files} files agree"), files, True

    # Results

    def _store(self, due: Due, verdict: Verdict) -> None:
        """The result as the check of its archive, with the run that published it."""
        run_id = due.run_id or self._run_id_of_handmade()
        evaluation = dg.AssetCheckEvaluation(
            asset_key=due.asset,
            check_name=AUDITED,
            passed=verdict.passed,
            description=verdict.what,
            metadata=dict(verdict.facts),
            partition=due.archive,
            target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
                storage_id=due.storage_id, run_id=run_id, timestamp=due.timestamp
            ),
        )
        self._instance.report_dagster_event(
            DagsterEvent(
                event_type_value=DagsterEventType.ASSET_CHECK_EVALUATION.value,
                event_specific_data=evaluation,
                job_name=AUDITED,
            ),
            run_id,
        )
        self._stored += 1
        if not verdict.passed:
            self.faults.append(f"{due.asset.to_user_string()} {due.archive or ''}: {verdict.what}")

    def _run_id_of_handmade(self) -> str:
        """For results on what no run has made: one of its own for each tick."""
        self._handmade_run_id = self._handmade_run_id or make_new_run_id()
        return self._handmade_run_id

    def _time_left(self, until_s: float) -> bool:
        return time.monotonic() - self._began_s < until_s


_LATER = Verdict(AUDITED, False, "left for the next tick")


def audited_assets(specs: Iterable[DatasetSpec]) -> list[dg.AssetKey]:
    """The assets of these datasets that are audited."""
    return [key for spec in specs for key in audited_keys(spec)]
