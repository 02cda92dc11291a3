"""``python -m tokgraph.cli``."""

from .main import main

if __name__ == "__main__":  # a process that `inspect` starts imports this file
    main()
