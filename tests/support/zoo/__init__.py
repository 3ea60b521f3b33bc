"""Tiny random models through their real Transformers classes, and an independent oracle for each."""
