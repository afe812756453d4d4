"""The command `yapo`.

It is a separate package, so that `yapo --help` and shell completion do not import torch: each command imports what it
needs when it runs.
"""

from .main import main

__all__ = ["main"]
