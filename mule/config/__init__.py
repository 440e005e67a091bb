"""The recipe: its schema, its strict loader and what is written from it."""
