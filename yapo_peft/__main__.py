"""`python -m yapo_peft` is the command `yapo`."""

import sys

from yapo_cli import main

sys.exit(main())
