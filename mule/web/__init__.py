"""`mule ui`: pages over mule.commands, for a browser on this machine."""
