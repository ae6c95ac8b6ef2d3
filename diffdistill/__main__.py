"""`python -m diffdistill` is the `diffdistill` command."""

import sys

from diffdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
