"""Bytes: fetching, archives, images, shards, captions, and the protocol that publishes them."""
