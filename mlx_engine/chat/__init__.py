"""Conversations <-> text: what callers send into a model's chat template, and answers out of its
text. No MLX here.
"""
