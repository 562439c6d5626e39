"""A thin trainer for self-distillation on top of vmf_kernels. Importing it imports nothing heavy: a wrong setting is answered at once."""
