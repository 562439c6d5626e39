"""Drop-ins for published codebases: one module for each, with its signatures, defaults and state-dict keys."""
