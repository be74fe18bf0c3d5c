"""Whole-system measurements. Every one is `python -m benchmarks.NAME`; the last line of each is JSON."""
