"""Settings of a run: a file for each section, and YAML."""
