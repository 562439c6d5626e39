"""The loss head of self-distillation, exact and streaming."""
