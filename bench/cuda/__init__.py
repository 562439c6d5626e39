"""The CUDA C++ kernels, compiled and their launches recorded without a GPU."""
