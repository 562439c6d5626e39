"""One file for each family of functions: how a case becomes a call, and how its results are judged."""
