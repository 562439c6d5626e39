"""The command ``vmf-bench``: the losses of this library against others, checked and then timed, on any machine."""
