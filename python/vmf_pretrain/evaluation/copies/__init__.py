"""Altered copies of images found among originals and distractors, as on Copydays."""
