"""Benchmarks: ``experiments/<name>.json`` to ``results/<name>.json``."""
