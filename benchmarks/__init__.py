"""Benchmarks of tmx_compile: ``python -m benchmarks.run`` measures, ``python -m tools.pages`` writes the tables."""
