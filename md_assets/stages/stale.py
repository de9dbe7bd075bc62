"""stale: why an archive is not what the settings of today would make of the inputs of today.

Here: the comparison, and its grouping. Not here: reading ledgers (`stages.status`), the settings of a run
(`orchestration.run_config`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from md_assets.core.errors import SettingsError
from md_assets.core.paths import StageDir
from md_assets.core.settings import (
    EncoderSettings,
    ImageSettings,
    latents_settings,
    mds_settings,
    raw_settings,
    subset_settings,
)
from md_assets.core.spec import DatasetSpec

REVISIONS = ("encoders.vae_revision", "encoders.text_encoder_revision")
"""Settings that may be unknown, because only the Hub knows them; they are not compared then."""


@dataclass(frozen=True)
class WantedSettings:
    """What archives are compared with.

    Attributes:
        images, encoders: as a run would use them; an empty revision of a model is unknown, and not compared.
        encoder_tag: the pair of `encoders`. Revisions of another pair's latents are not compared.
    """

    images: ImageSettings = field(default_factory=ImageSettings)
    encoders: EncoderSettings = field(default_factory=lambda: EncoderSettings("", "", "", ""))
    encoder_tag: str = ""

    def of(self, spec: DatasetSpec, stage_dir: StageDir) -> dict[str, Any]:
        """The settings with which a run would make an archive of `stage_dir` now."""
        if stage_dir.stage == "raw":
            return raw_settings(self.images)
        settings = mds_settings(spec, self.images)
        if stage_dir.stage == "latents":
            ours = stage_dir.path.name.partition("latents_")[2] == self.encoder_tag
            unknown = replace(self.encoders, vae_revision="", text_encoder_revision="")
            settings = latents_settings(settings, self.encoders if ours else unknown)
        for subset in spec.subsets:
            if subset.name == stage_dir.subset:
                try:
                    return subset_settings(settings, subset)
                except SettingsError:  # the subset cannot be made with these: then nothing else is said of it
                    return {**settings, "subset": {"name": subset.name, "min_edge_px": subset.min_edge_px}}
        return settings


@dataclass(frozen=True)
class Difference:
    """One thing in which archives differ from what is wanted.

    Attributes:
        what: a setting with dots, e.g. `images.jpeg_quality`; or `input mds`: what the archive was made of has changed.
        found: the setting's value in the archives; None where they do not have it, and for an input.
        wanted: the value wanted; None where it must not be there, and for an input.
    """

    what: str
    found: Any = None
    wanted: Any = None

    @property
    def is_input(self) -> bool:
        return self.what.startswith("input ")


@dataclass(frozen=True)
class StaleGroup:
    """The archives of a stage that differ in one thing; an archive may be in several groups."""

    difference: Difference
    archives: tuple[str, ...]


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The settings that differ, by name; revisions only where they are known."""
    ours, theirs = dict(_flat(wanted)), dict(_flat(found))
    unknown = {name for name in REVISIONS if ours.get(name) == ""}
    return tuple(
        Difference(name, theirs.get(name), ours.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if name not in unknown and (name not in ours or name not in theirs or ours[name] != theirs[name])
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_inputs(inputs: Mapping[str, str], now: Mapping[str, str]) -> tuple[Difference, ...]:
    """The inputs whose content is another one now; `now` holds those that are known."""
    return tuple(Difference(f"input {name}") for name, content in inputs.items() if now.get(name, content) != content)
