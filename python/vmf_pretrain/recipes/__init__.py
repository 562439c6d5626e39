"""Settings by name, one YAML file each, and the choice among them for a machine and its images."""
