"""Whether this machine and these images are ready for a run, before hours are spent on it."""
