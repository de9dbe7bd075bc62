"""The models: captions and images in, latents out.

With `loader/` the only package that imports torch on top, so nothing that is loaded with the code location
imports it at module level.

Here: loading and running the models, and the batches they run on. Not here: which archive is encoded, what
is stored of the result and when it is published, see `stages.latents`.
"""
