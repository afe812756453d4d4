"""The name of the extra argument under which requests ask for steering. Importing it imports nothing else."""

KEY = "yapo"
