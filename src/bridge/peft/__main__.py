"""`python -m bridge.peft`: the same as the `bridge-peft` command."""

import sys

from bridge.peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
