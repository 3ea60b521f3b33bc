"""Measuring one attention layer: dense SDPA against the lowerings, and both against what the machine allows."""
