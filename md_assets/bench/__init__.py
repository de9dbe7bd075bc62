"""Benchmarks that anybody can repeat: each compares two ways side by side in one run, never against a clock alone."""
