"""Losses written by others, or as others would write them, on the same ``HeadInputs``."""
