"""``python -m tools.pages``."""

from tools.pages.run import main

main()
