"""How prompts get in and answers get out."""
