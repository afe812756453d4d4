"""`python -m yapo_cli`, and `accelerate launch -m yapo_cli`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
