"""Preconditioners for training implicit neural representations, derived, implemented and reproduced."""
__version__ = "0.1.0"
