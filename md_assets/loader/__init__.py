"""The training side: one data loader over any mixture of latent datasets.

Here: what a trainer imports. Not here: how latents are made, see `stages.latents`.
Importing this package imports torch and streaming.
"""

from md_assets.loader.latents import build_latents_dataloader
from md_assets.loader.layout import LatentsLayout
from md_assets.loader.streams import LatentsStream, count_samples, samples_by_directory

__all__ = [
    "LatentsLayout",
    "LatentsStream",
    "build_latents_dataloader",
    "count_samples",
    "samples_by_directory",
]
