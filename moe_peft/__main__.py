"""`python -m moe_peft` is the command `moe-peft`."""

import sys

from moe_peft.cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory; the command looks there last
    sys.exit(main.main())
