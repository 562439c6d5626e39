"""``python -m vmf_pretrain`` is the command ``vmf-pretrain``; so is ``torchrun ... -m vmf_pretrain``."""

import sys

from vmf_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
