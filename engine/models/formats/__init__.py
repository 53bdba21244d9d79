"""Weight formats: one file each, which owns how its weights are read."""
