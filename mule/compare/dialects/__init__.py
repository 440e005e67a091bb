"""How other tools write their settings: one table for each tool."""
