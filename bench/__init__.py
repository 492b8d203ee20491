"""Benchmarks: medians of several rounds, in one run, written as a table and as JSON."""
