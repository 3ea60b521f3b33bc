"""The generated parts of the documents: ``python -m tools.pages`` writes them, ``--check`` compares them."""
