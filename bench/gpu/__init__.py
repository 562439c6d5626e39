"""The benchmark of a GPU: ``python -m bench.gpu``; see ``__main__``."""
