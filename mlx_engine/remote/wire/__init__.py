"""What is said between an engine and those who use it from elsewhere, and how it travels."""
