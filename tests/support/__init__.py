"""What tests share, and the only place that tests import from: no test imports another."""
