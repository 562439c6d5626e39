"""Drop-ins for published codebases, one module each, with their signatures, defaults and state-dict keys."""
