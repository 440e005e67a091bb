"""Checks that name settings which look like a mistake."""
