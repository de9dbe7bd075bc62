"""The settings that runs would use: the resources' defaults, or those of a run-config file.

Here: resources as plain values, for what is compared with them outside a run. Not here: the comparison
(`stages.stale`), the fields (`orchestration.resources`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import dagster as dg

from md_assets.core.errors import MdAssetsError, SettingsError, one_line
from md_assets.core.settings import EncoderSettings
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.stages.stale import WantedSettings


def wanted_settings(config_file: Path | None) -> tuple[WantedSettings, str]:
    """The settings of a run, with the models' revisions where these can be had.

    Args:
        config_file: run config of Dagster in YAML, of which `resources` count; None for the defaults.

    Returns: the settings, and why revisions of models are unknown; empty where they are known.

    Raises:
        SettingsError: the file cannot be read, or a value in it is wrong.
    """
    hub, images, encoders = _resources(config_file)
    try:
        known, problem = encoders.settings(hub.client()), ""
    except MdAssetsError as error:
        known, problem = _without_revisions(encoders), str(error)
    return WantedSettings(images.settings(), known, encoders.tag()), problem


def _resources(config_file: Path | None) -> tuple[HubResource, ImagesResource, EncodersResource]:
    if config_file is None:
        # Whoever asks for a table does not wait for minutes until the Hub answers.
        return HubResource(attempts=1, connect_timeout_s=5.0), ImagesResource(), EncodersResource()
    kinds: dict[str, Any] = {"hub": HubResource, "images": ImagesResource, "encoders": EncodersResource}
    try:
        config = dict(dg.config_from_files([str(config_file)]).get("resources", {}))
        given = {name: config[name] for name in kinds if name in config}
        made = {name: kind.configure_at_launch() for name, kind in kinds.items()}
        with dg.build_resources(made, resource_config=given) as resources:
            return resources.hub, resources.images, resources.encoders
    except (dg.DagsterError, OSError, ValueError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"{config_file} is no run config of Dagster: {one_line(str(error))}",
            "Write resources: images: config: ... as the launchpad does",
        ) from error


def _without_revisions(encoders: EncodersResource) -> EncoderSettings:
    unknown: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "vae_revision", "text_encoder_revision"), "")
    fields = {field.name for field in dataclasses.fields(EncoderSettings)} - unknown.keys()
    given = {name: getattr(encoders, name) for name in fields}
    return EncoderSettings(**unknown, **{**given, "image_resolutions": tuple(given["image_resolutions"])})
