"""``python -m vmf_bench``, where the command is not on the path."""

import sys

from vmf_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
