"""A run over a range of archives in which each archive stands or falls alone.

Each archive that is published is recorded at once, with its metadata and checks; one that fails is logged and the
run goes on; after the last one the step fails and names the failed ones. So the run is red, what is done stays done,
and a re-run passes over it. (Returning a result from a ranged run would record every partition of the range.)

A run of one partition records its archive by returning the result, at its end: Dagster passes over what comes after an
asset that returned none, and so `raw`, `mds` and `latents` of one archive can be materialized in one run.

Here: recording. Not here: the work on an archive, see `stages/`.
"""

from collections.abc import Callable, Mapping, Sequence

import dagster as dg

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Ledger
from md_assets.core.paths import StageDir
from md_assets.core.progress import ProgressLines
from md_assets.orchestration.checks import evaluate
from md_assets.orchestration.metadata import archive_metadata
from md_assets.orchestration.records import keep_connection, stored_together
from md_assets.stages.once import Outcome

DATA_VERSION_TAG = "dagster/data_version"
"""`dagster._core.definitions.data_version.DATA_VERSION_TAG`, which Dagster does not export."""

FAILED_SHOWN = 20
"""Failed archives that the failure's sentence names; its table has all of them."""

FAILURES_KEY = "failures"
"""Metadata of a failure for programs: archive -> why it failed, its reason, and whether waiting may help."""

REASON_KEY, TRANSIENT_KEY = "reason", "transient"
"""The same of a failure that concerns a whole run."""


class ArchiveRun:
    """Records what becomes of each archive of a run.

    Args:
        context: of the asset, `<dataset>/<stage>`.
        stage_dir: where the run publishes.
        upstream: where the stage reads; None for raw.

    Attributes:
        progress: takes the stages' progress and writes it to the run's log.
        failures: archives that failed so far.
    """

    def __init__(self, context: dg.AssetExecutionContext, stage_dir: StageDir, upstream: StageDir | None) -> None:
        self._context = context
        self._key = dg.AssetKey([stage_dir.dataset, stage_dir.asset])
        self._stage_dir = stage_dir
        self._upstream = upstream
        self._name = self._key.to_user_string()
        self._done = self._passed_over = 0
        self._results: list[dg.MaterializeResult] = []
        self.progress = ProgressLines(stage_dir.dataset, context.log.info)
        self.failures: list[ArchiveError] = []
        keep_connection(context.instance)

    def each(self, archives: Sequence[str], work: Callable[[str], Outcome]) -> None:
        """Do `work` on each archive in order and record it."""
        for archive in archives:
            try:
                self.record(work(archive))
            except ArchiveError as error:
                self.fail(error)

    def record(self, outcome: Outcome, further: Mapping[str, dg.MetadataValue] | None = None) -> None:
        """An archive is published: record it, and check it; without reading all of it if that was done before.

        Args:
            outcome: what came of it.
            further: metadata beside those that its ledger gives.
        """
        with stored_together(self._context.instance):
            self._record(outcome, further or {})

    def _record(self, outcome: Outcome, further: Mapping[str, dg.MetadataValue]) -> None:
        ledger = outcome.ledger
        self._done += 1
        self._passed_over += outcome.passed_over
        alone = self._context.has_partition_key
        pictures = alone or not outcome.passed_over  # or passing over 14,000 archives would store 0.2 GB of them again
        facts = archive_metadata(self._stage_dir, ledger, outcome.passed_over, pictures=pictures)
        metadata = {**facts, **further}
        tags = {DATA_VERSION_TAG: data_version(ledger.content_id), **made_of_tags(self._stage_dir, ledger)}
        if outcome.passed_over:
            said = f"{self._name} {ledger.archive}: already published, passed over"
        else:
            said = f"{self._name} {ledger.archive}: {ledger.read:,} read, {ledger.kept:,} kept, "
            said += f"{ledger.rejected_count:,} rejected in {ledger.seconds:.1f} s"
        if alone:
            version = dg.DataVersion(tags[DATA_VERSION_TAG])
            self._results.append(dg.MaterializeResult(self._key, metadata=metadata, data_version=version, tags=tags))
            self._context.log.info(said)
        else:  # its description is its line in the run's log: one event less to store for each archive
            self._context.log_event(
                dg.AssetMaterialization(
                    self._key, description=said, partition=ledger.archive, metadata=metadata, tags=tags
                )
            )
        checks = evaluate(self._key, self._stage_dir, self._upstream, ledger.archive, read_all=not outcome.passed_over)
        for evaluation in checks:
            self._context.log_event(evaluation)
            if not evaluation.passed:
                self._context.log.error(f"{self._name} {ledger.archive}: {evaluation.description}")

    def fail(self, error: ArchiveError) -> None:
        """An archive failed; nothing of it is published."""
        self.failures.append(error)
        self._context.log.error(f"{self._name}: {error}")

    def waiting(self, archive: str) -> None:
        """Another run works on the archive."""
        self._context.log.info(f"{self._name} {archive}: another run works on it, waiting")

    def finish(self) -> list[dg.MaterializeResult]:
        """End the run.

        Returns: what the asset must yield: the result of a run of one partition, nothing for a range.

        Raises:
            dg.Failure: some archives failed. Retried by Dagster if waiting may help one of them.
        """
        summary = f"{self._name}: {self._done - self._passed_over} published, {self._passed_over} passed over"
        if not self.failures:
            self._context.log.info(summary)
            return self._results
        named = "; ".join(str(error) for error in self.failures[:FAILED_SHOWN])
        rows = [f"| {e.archive} | {e.reason} | {_what(e).replace('|', '/')} | {e.remedy} |" for e in self.failures]
        raise dg.Failure(
            f"{len(self.failures)} of {self._done + len(self.failures)} archives failed. {named}",
            metadata={
                "failed_archives": dg.MetadataValue.md(
                    "\n".join(["| archive | reason | what | remedy |", "| --- | --- | --- | --- |", *rows])
                ),
                "summary": f"{summary}, {len(self.failures)} failed",
                FAILURES_KEY: dg.MetadataValue.json(
                    {e.archive: {"why": str(e), "reason": e.reason, "transient": e.transient} for e in self.failures}
                ),
            },
            allow_retries=any(error.transient for error in self.failures),
        )


def _what(error: ArchiveError) -> str:
    """What happened, without the archive, which has a column of its own."""
    return error.what.removeprefix(f"{error.dataset} {error.archive}: ")


def data_version(content_id: str) -> str:
    """The data version of a published archive, by the content id of its ledger."""
    return content_id[:32]


def made_of_tag(upstream: dg.AssetKey) -> str:
    """The tag of a materialization that says of which data version of an upstream asset it was made."""
    return f"dagster/input_data_version/{upstream.to_user_string()}"


def made_of_tags(stage_dir: StageDir, ledger: Ledger) -> dict[str, str]:
    """These tags, as the ledger has it: Dagster itself would tell the version of when the run began.

    Captions are left out: the data version of theirs is of several files.
    """
    return {
        made_of_tag(dg.AssetKey([stage_dir.dataset, name])): content if name == "archive" else data_version(content)
        for name, content in ledger.inputs.items()
        if name != "annotations"
    }
