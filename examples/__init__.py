"""Runs with `python -m examples.NAME` from the root of the source tree."""
