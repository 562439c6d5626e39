"""From a configuration to a trained network."""
