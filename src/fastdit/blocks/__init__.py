"""How a forward calls its blocks: what was observed of it, and who answers."""
