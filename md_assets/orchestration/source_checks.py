"""What people are told of archives whose links expire: in the observation, and by a check three days ahead.

Here: numbers of a list of links as metadata, and the check `links_valid`. Not here: the list itself (`storage.links`),
the checks of published archives (`orchestration.checks`). Nothing is read before a run.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any

import dagster as dg

from md_assets.core.errors import MdAssetsError
from md_assets.core.paths import DataRoot
from md_assets.core.source import LinkedFile
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.resources import HubResource
from md_assets.storage.links import Link, time_text
from md_assets.storage.sources import Sources

WARN_AHEAD_S = 3 * 24 * 3600
"""Long enough to get a new list over a weekend."""


def linked_files(spec: DatasetSpec) -> dict[str, LinkedFile]:
    """The archives whose addresses stand in a list of links."""
    files = {archive: spec.locate(archive) for archive in spec.archives}
    return {archive: file for archive, file in files.items() if isinstance(file, LinkedFile)}


def lists_metadata(spec: DatasetSpec, sources: Sources) -> dict[str, Any]:
    """Links, the expired ones among them, the earliest and latest expiry; empty where no list of links is used."""
    found: dict[str, Any] = {}
    for variable in sorted({file.list_variable for file in linked_files(spec).values()}):
        links = sources.lists.links(variable)
        if links is not None:
            found |= {f"{variable} {name}": value for name, value in _numbers(links.values()).items()}
    return found


def _numbers(links: Collection[Link]) -> dict[str, Any]:
    expiries_s = sorted(link.expires_s for link in links if link.expires_s is not None)
    numbers: dict[str, Any] = {
        "links": len(links),
        "expired": sum(expiry_s <= time.time() for expiry_s in expiries_s),
    }
    if expiries_s:
        numbers |= {
            "earliest expiry": dg.MetadataValue.timestamp(expiries_s[0]),
            "latest expiry": dg.MetadataValue.timestamp(expiries_s[-1]),
        }
    return numbers


def links_checks(spec: DatasetSpec, key: dg.AssetKey) -> list[dg.AssetChecksDefinition]:
    """The check of the links of a dataset's archives; none where no archive has a link.

    Args:
        key: of the asset of the archives at their source.
    """
    if not linked_files(spec):
        return []

    @dg.asset_check(
        asset=key,
        name="links_valid",
        description="No link of an archive that is not published in raw yet has expired, or expires within "
        f"{WARN_AHEAD_S // 86400} days.",
    )
    def links_valid(hub: HubResource) -> dg.AssetCheckResult:
        return evaluate_links(spec, hub.sources())

    return [links_valid]


def evaluate_links(spec: DatasetSpec, sources: Sources) -> dg.AssetCheckResult:
    """The result of `links_valid` now."""
    from md_assets.stages.once import recorded

    def result(passed: bool, what: str, facts: Mapping[str, Any]) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=passed, severity=dg.AssetCheckSeverity.WARN, description=what, metadata=dict(facts)
        )

    files = linked_files(spec)
    variables = sorted({file.list_variable for file in files.values()})
    try:
        lists = {variable: sources.lists.links(variable) for variable in variables}
    except MdAssetsError as error:
        return result(False, str(error), {})
    if all(links is None for links in lists.values()):
        return result(True, f"no link list is set ({', '.join(variables)}); the mirror is used", {})

    stage_dir, soon_s = DataRoot.from_environment().raw(spec.slug), time.time() + WARN_AHEAD_S
    due_s: dict[str, float] = {}
    for archive, file in files.items():
        link = (lists[file.list_variable] or {}).get(file.name)
        if link is None or link.expires_s is None or link.expires_s > soon_s:
            continue
        if recorded(stage_dir, archive) is None:
            due_s[archive] = link.expires_s
    facts = lists_metadata(spec, sources)
    if not due_s:
        return result(True, "every link that is still needed is good for three days and more", facts)
    expired = sum(expiry_s <= time.time() for expiry_s in due_s.values())
    return result(
        False,
        f"of the links of archives that are not fetched yet {expired} have expired and {len(due_s) - expired} will "
        f"within three days, the earliest at {time_text(min(due_s.values()))}. Get a new list from the dataset's page "
        f"and set {' and '.join(variables)} to it; what is done stays done.",
        {**facts, "archives": ", ".join(list(due_s)[:20]) + (", …" if len(due_s) > 20 else "")},
    )
