"""The operators as torch sees them: arguments in, autograd recorded, a backend called."""
