"""First light: every kernel is called by itself on inputs with a known result; ``bench/first_light.py`` is the program."""
