"""`python -m comm_core` is `comm-core`."""

import sys

from comm_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
