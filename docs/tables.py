"""Writes the generated tables of README.md: `make tables`. With --check it only tells whether they are up to date.

Here: the tables. Not here: what they are made of, the specs, the resources and the faults that the demo's miniatures
plant. That the demo does come out so is tested in `md_assets_tests/end_to_end/test_demo.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import dagster as dg

from md_assets.datasets import all_specs
from md_assets.demo.sandbox import MINIATURES
from md_assets.demo.walkthrough import archives_of_demo
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource

README = Path(__file__).resolve().parent.parent / "README.md"


def datasets() -> Iterable[str]:
    """One row for each dataset that is there."""
    yield "| slug | dataset | archives | partitions | small subset |"
    yield "| --- | --- | ---: | --- | --- |"
    for spec in all_specs():
        partitions = " … ".join(f"`{archive}`" for archive in dict.fromkeys((spec.archives[0], spec.archives[-1])))
        small = "all" if spec.small == spec.archives else f"{len(spec.small)} archives"
        yield f"| `{spec.slug}` | {spec.title} | {len(spec.archives):,} | {partitions} | {small} |"


def settings() -> Iterable[str]:
    """One row for each field of the resources."""
    yield "| resource | field | default | what it does |"
    yield "| --- | --- | --- | --- |"
    resources: dict[str, type[dg.ConfigurableResource]] = {
        "hub": HubResource,
        "images": ImagesResource,
        "encoders": EncodersResource,
    }
    for name, resource in resources.items():
        for field_name, field in resource.model_fields.items():
            default = "" if field.default is None else f"`{field.default}`"
            meaning = (field.description or "").replace("<", "&lt;")
            yield f"| `{name}` | `{field_name}` | {default} | {meaning} |"


def demo() -> Iterable[str]:
    """One row for each dataset of the demo: what becomes of its samples."""
    yield "| dataset | archives | samples read | rejected when fetched | rejected when converted | latents |"
    yield "| --- | ---: | ---: | --- | --- | ---: |"
    for slug, miniature in MINIATURES.items():
        archives = len(archives_of_demo(slug))
        rejected = [
            ", ".join(f"{reason} {archives * count}" for reason, count in sorted(counts.items()))
            for counts in (miniature.rejected_by_raw, miniature.rejected_by_mds)
        ]
        read, latents = archives * miniature.samples, archives * (miniature.samples - miniature.lost)
        yield f"| `{slug}` | {archives} | {read} | {rejected[0]} | {rejected[1]} | {latents} |"


TABLES: dict[str, Callable[[], Iterable[str]]] = {"demo": demo, "datasets": datasets, "settings": settings}


def with_tables(text: str) -> str:
    """`text` with each table between its markers as it is made now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: made by `make tables` -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"README.md has no markers for the table {name}")
        text = f"{before}{begin}{chr(10).join(table())}\n{end}{after}"
    return text


def main() -> int:
    """Write the tables, or check them; returns the exit code."""
    text = README.read_text(encoding="utf-8")
    made = with_tables(text)
    if "--check" in sys.argv[1:]:
        return 0 if made == text else 1
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
