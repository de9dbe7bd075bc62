"""The embedded demo: miniature sources on a Hub of this machine, tiny encoders, and a walk through all stages.

It is also what tests and newcomers start from, so everything in it speaks the real protocols and formats.
"""
