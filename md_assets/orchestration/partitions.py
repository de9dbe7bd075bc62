"""Partitions: one for each archive, spelled as upstream spells its ID.

Here: partition definitions and the archives of a run. Not here: the IDs, see `datasets/`.
"""

import dagster as dg

from md_assets.core.spec import DatasetSpec


def archive_partitions(spec: DatasetSpec) -> dg.StaticPartitionsDefinition:
    """One partition for each archive of a dataset, in upstream's order."""
    return dg.StaticPartitionsDefinition(list(spec.archives))


def archives_of(context: dg.AssetExecutionContext, spec: DatasetSpec) -> list[str]:
    """The archives that a run covers, in upstream's order, so that a repeated range does the same."""
    covered = set(context.partition_keys)
    return [archive for archive in spec.archives if archive in covered]
