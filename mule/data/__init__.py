"""Data files to rows of tokens: read, render, check, pack, store, load."""
