"""Settings of evaluations; nothing here imports torch."""
