"""The tests, laid out like the package. What they share stands in ``support``, and no test imports another."""
