"""Several engines as one, and those who keep them alive."""
