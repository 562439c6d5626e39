"""A thin trainer for self-distillation on top of vmf_kernels; importing it is quick, so that a mistake is answered at once."""
