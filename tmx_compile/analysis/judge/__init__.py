"""What a choice of layers costs."""
