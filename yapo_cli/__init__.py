"""The command `yapo`.

It is a package of its own, so that `yapo --help` and shell completion need not wait for torch: each command imports
what it needs when it runs.
"""

from .main import main

__all__ = ["main"]
