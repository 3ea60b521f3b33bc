"""Lowerings of ``tmx::triangle_attention``: one file or folder per target, none importing another."""
