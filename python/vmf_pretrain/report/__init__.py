"""What a person sees of a run: plots, summary, verdict."""
