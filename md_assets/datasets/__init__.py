"""One module per dataset: its datasheet, its SPEC and how its samples are read.

Here: discovery. A dataset is a module of this package with an attribute `SPEC`; adding one is adding a file.
Not here: anything that two datasets share, see `stages/` and `storage/`.
"""

from __future__ import annotations

import importlib
import pkgutil

from md_assets.core.errors import SettingsError
from md_assets.core.spec import DatasetSpec


def all_specs() -> tuple[DatasetSpec, ...]:
    """The specs of all datasets, by module name.

    Raises:
        SettingsError: a module without SPEC, or whose SPEC is called otherwise than the module.
    """
    specs = []
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        spec = getattr(module, "SPEC", None)
        if not isinstance(spec, DatasetSpec) or spec.slug != module_info.name:
            raise SettingsError(
                f"md_assets/datasets/{module_info.name}.py has no SPEC with slug {module_info.name!r}",
                "Define SPEC = DatasetSpec(slug=..., ...).",
            )
        specs.append(spec)
    return tuple(specs)


def spec_of(slug: str) -> DatasetSpec:
    """The spec of one dataset.

    Raises:
        SettingsError: there is no such dataset.
    """
    specs = {spec.slug: spec for spec in all_specs()}
    if slug not in specs:
        raise SettingsError(f"there is no dataset {slug!r}", f"Choose one of {', '.join(specs)}.")
    return specs[slug]
