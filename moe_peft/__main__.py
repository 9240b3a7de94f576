"""`python -m moe_peft` is the command `moe-peft`."""

import sys

from moe_peft.cli import main

if __name__ == "__main__":
    sys.exit(main.main())
