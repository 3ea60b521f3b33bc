"""The commands of ``tmx``: one module each, with its arguments and what it does; none computes anything itself."""
