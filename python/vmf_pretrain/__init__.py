"""A thin trainer for self-distillation on top of vmf_kernels; importing it imports nothing heavy."""
