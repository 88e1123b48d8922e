"""A promise that an engine does not keep."""


class Fault(AssertionError):
    """A promise is not kept; the message says which."""
