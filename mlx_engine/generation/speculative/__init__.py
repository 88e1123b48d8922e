"""Speculative decoding: some propose tokens, the model verifies them together."""
