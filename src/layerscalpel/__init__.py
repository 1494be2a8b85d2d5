"""Layer Scalpel: remove the contiguous run of decoder layers that matters least, heal the seam, prove the result."""

__version__ = "0.1.0"
