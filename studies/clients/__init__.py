"""What people put around a model, one short program each; ``python -m studies.run clients`` runs and records them.

Each needs its library (``requirements.txt`` beside this file); nothing is downloaded.
"""
