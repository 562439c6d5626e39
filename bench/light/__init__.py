"""First light: every kernel called by itself on inputs whose result is known; ``bench/first_light.py`` is the program."""
