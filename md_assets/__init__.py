"""md_assets: image-text datasets for diffusion training, as Dagster assets. Here: the version only."""

__version__ = "0.1.0"
