"""Random calls of every public function against its formula in fp64: ``python -m tests.fuzz --help``."""
