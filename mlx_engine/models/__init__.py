"""Where models come from: the embedded demo model, and everything that loads weights."""
