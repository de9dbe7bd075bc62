"""Where the code of an asset is, for the UI's **Open in editor**: its dataset, what a run of it does, its stage.

Here: these references. Not here: the asset itself (`orchestration.assets`).
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import dagster as dg

from md_assets.core.spec import DatasetSpec

METADATA_KEY = "dagster/code_references"
"""The key under which the UI looks for them; Dagster does not export it."""


def code_references(run: Callable[..., Any], stage: str, spec: DatasetSpec | None = None) -> dict[str, Any]:
    """Metadata of an asset that say where its code is, on the machine of the code location.

    Args:
        run: what a run of the asset calls.
        stage: the module of `stages/` that does the work; empty where none does. It is not imported, as stages bring
            numpy and Pillow.
        spec: the asset's dataset; None for an asset over all of them.
    """
    code = run.__code__
    references: list[dg.LocalFileCodeReference | dg.UrlCodeReference] = [
        *_module(f"md_assets.datasets.{spec.slug}" if spec else "", "dataset"),
        dg.LocalFileCodeReference(file_path=code.co_filename, line_number=code.co_firstlineno, label="run"),
        *_module(f"md_assets.stages.{stage}" if stage else "", "stage"),
    ]
    return {METADATA_KEY: dg.CodeReferencesMetadataValue(code_references=references)}


def _module(name: str, label: str) -> Iterator[dg.LocalFileCodeReference]:
    """A reference to a module; none if there is no such one."""
    found = find_spec(name) if name else None
    if found and found.origin:
        yield dg.LocalFileCodeReference(file_path=found.origin, line_number=1, label=label)
