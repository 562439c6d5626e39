"""The cases of ``bench.same_bits``: losses, gradients and states whose every bit a refactoring has to keep."""
