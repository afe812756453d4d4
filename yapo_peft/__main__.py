"""`python -m yapo_peft` is the command `yapo`."""

import sys

from .cli import main

sys.exit(main())
