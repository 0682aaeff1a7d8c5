"""`python -m luthier`: the command line, for launchers that start a module."""

import sys

from luthier.cli import main

if __name__ == "__main__":
    sys.exit(main())
