"""Benchmarks of tmx_compile: ``python -m benchmarks.run`` measures, ``python -m benchmarks.docs`` writes the tables."""
