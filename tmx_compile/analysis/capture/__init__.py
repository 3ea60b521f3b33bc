"""A model as the pass understands it, with switches at its sites."""
