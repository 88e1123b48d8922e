"""The other side: an engine in this process for those who use it from elsewhere."""
