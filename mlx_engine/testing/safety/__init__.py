"""Whether an engine keeps its promises about cancellation, tried on the machine that it runs on."""
