"""An OpenAI-compatible server around engines: routes, and the guard in front of all of them."""
