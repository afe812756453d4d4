"""Programs that `python -m` and `accelerate launch -m` run."""
