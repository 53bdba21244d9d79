"""``python -m headstart.server.cli``: the same as ``headstart``."""

import sys

from headstart.server.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
