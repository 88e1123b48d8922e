"""Engines in other processes and on other machines, and those who watch over them."""
