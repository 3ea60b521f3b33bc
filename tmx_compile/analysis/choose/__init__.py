"""Which layers go sparse."""
