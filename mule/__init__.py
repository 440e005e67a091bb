"""Mule carries a small language model through its whole life and proves every step."""

__version__ = "0.1.0"
