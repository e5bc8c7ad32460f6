"""`python -m upbench`."""

import sys

from upbench.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
