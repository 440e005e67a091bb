"""Comparing architectures: campaigns, their measurements and reports, modules of the user."""
