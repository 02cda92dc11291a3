"""``python -m tokgraph.cli``."""

from .main import main

main()
