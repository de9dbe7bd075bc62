"""Weekly refreshes: each dataset's archives are observed at their source, and what changed there is said.

A changed archive gets another data version, which makes raw of it stale. Nothing is ever deleted, also not what has
vanished at the source.

Here: the comparison with what was known before, the jobs `<ds>_refresh` and their schedules. Not here: the observation
itself (`orchestration.stage_runs`).
"""

import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from md_assets.core.errors import MdAssetsError
from md_assets.core.names import first_of
from md_assets.core.paths import DataRoot
from md_assets.core.source import HubFile, LinkedFile, WebFile
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import DATA_VERSION_TAG
from md_assets.orchestration.backfills import DATASET_TAG
from md_assets.storage.publish import read_numbers
from md_assets.storage.sources import Sources

NAMED = 20
"""Archives of each kind that are named; all of them are in the partitions' data versions."""


@dataclass(frozen=True)
class Changes:
    """What an observation found, compared with what was known.

    Attributes:
        observed: archives that the source has.
        first: whether nothing had been observed before.
        new: that it did not have at the observation before.
        changed: with another content than at the observation before.
        vanished: that were observed before, and that it no longer has.
        outdated: whose published raw was made of another content.
        revisions: repository -> commit that was observed.
    """

    observed: int
    first: bool
    new: tuple[str, ...]
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    outdated: tuple[str, ...]
    revisions: Mapping[str, str]

    def lines(self) -> list[str]:
        """What there is to say, one line for each kind."""
        if self.first:
            lines = [f"{self.observed:,} archives, observed for the first time"]
        else:
            told = f"{len(self.changed):,} changed and {len(self.new):,} new since the observation before"
            lines = [f"{self.observed:,} archives: {told}, {len(self.vanished):,} vanished"]
        kinds = {
            "changed": self.changed,
            "new": () if self.first else self.new,
            "vanished (what was made of them stays)": self.vanished,
            "raw is of another content": self.outdated,
        }
        return lines + [f"{kind}: {first_of(archives, NAMED)}" for kind, archives in kinds.items() if archives]

    def metadata(self) -> dict[str, Any]:
        """The same for the UI."""
        numbers = {
            "archives": self.observed,
            "new": len(self.new),
            "changed": len(self.changed),
            "vanished": len(self.vanished),
            "raw_of_another_content": len(self.outdated),
        }
        summary = dg.MetadataValue.md("\n".join(f"- {line}" for line in self.lines()))
        return {"summary": summary, **numbers, **{f"revision of {repo}": of for repo, of in self.revisions.items()}}


def find_changes(
    instance: dg.DagsterInstance,
    spec: DatasetSpec,
    sources: Sources,
    content_ids: Mapping[str, str],
    absent: Collection[str],
    root: DataRoot,
) -> Changes:
    """Compare an observation with the latest one of each archive, and with the ledgers of raw.

    Args:
        sources: that was asked, and remembers the answers.
        content_ids, absent: of `Sources.content_ids`.
    """
    before = known_versions(instance, spec)
    revisions: dict[str, str] = {}
    outdated = []
    for archive in content_ids:
        remote = sources.locate(spec.locate(archive))
        if remote.via == "hub":
            revisions[remote.name.partition(":")[0]] = remote.revision
        # A source that tells no content beforehand cannot be compared.
        if remote.content_id and _fetched(root, spec, archive) not in ("", remote.content_id):
            outdated.append(archive)
    return Changes(
        observed=len(content_ids),
        first=not before,
        new=tuple(archive for archive in content_ids if archive not in before),
        changed=tuple(a for a, version in content_ids.items() if before.get(a, version) != version),
        vanished=tuple(archive for archive in absent if archive in before),
        outdated=tuple(outdated),
        revisions=dict(sorted(revisions.items())),
    )


def known_versions(instance: dg.DagsterInstance, spec: DatasetSpec) -> dict[str, str]:
    """The content id of each archive that was ever observed, as of its latest observation."""
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        dg.AssetKey([spec.slug, "archive"]), dg.DagsterEventType.ASSET_OBSERVATION, [DATA_VERSION_TAG]
    )
    return {archive: of[DATA_VERSION_TAG] for archive, of in tags.items() if archive and DATA_VERSION_TAG in of}


def known_contents(instance: dg.DagsterInstance, spec: DatasetSpec) -> dict[str, str]:
    """The same of those archives whose source tells their content: of others the name is observed."""
    return {a: version for a, version in known_versions(instance, spec).items() if version != _file_name(spec, a)}


def _file_name(spec: DatasetSpec, archive: str) -> str:
    address: HubFile | WebFile | LinkedFile = spec.locate(archive)
    return posixpath.basename(address.name if isinstance(address, LinkedFile) else address.path)


def _fetched(root: DataRoot, spec: DatasetSpec, archive: str) -> str:
    """The content id of what raw was made of; empty where it is not published or did not know."""
    try:
        numbers = read_numbers(root.raw(spec.slug).ledger(archive))
    except MdAssetsError:
        return ""
    return numbers.inputs.get("archive", "") if numbers else ""


def refresh_job(spec: DatasetSpec) -> Any:
    """The job that observes all archives of a dataset."""
    return dg.define_asset_job(
        f"{spec.slug}_refresh",
        selection=[dg.AssetKey([spec.slug, "archive"])],
        tags={DATASET_TAG: spec.slug},
        description=f"Observes the archives of {spec.title} at their source and says what changed, is new or vanished.",
    )


def refresh_schedules(specs: Sequence[DatasetSpec]) -> list[dg.ScheduleDefinition]:
    """Each dataset's job once a week, one after the other; off until somebody turns it on."""
    return [
        dg.ScheduleDefinition(
            name=f"{spec.slug}_weekly_refresh",
            job=refresh_job(spec),
            cron_schedule=f"{10 * number} 4 * * 1",
            execution_timezone="UTC",
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description=f"Observes the archives of {spec.title} every Monday, with one listing of each repository.",
        )
        for number, spec in enumerate(specs)
    ]
