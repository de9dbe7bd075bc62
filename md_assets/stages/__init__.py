"""The steps from an upstream archive to latents, as functions that know neither Dagster nor who calls them.

raw *fetches*, annotations *indexes*, mds *converts*, latents *encode*, index *merges*, verify *verifies*.
Each works on one archive, is safe to repeat and to kill, and returns a ledger.
"""
