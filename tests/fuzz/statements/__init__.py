"""What the library computes, written out once more in plain torch on full [rows, K] tensors; nothing of the library is used.

Each works in the dtype of what it is given: in fp64 it is the truth, in fp32 the dense formula, whose error is the budget's
measure.
"""
