"""What a prompt and an answer are, and the promise that each accepted prompt gets exactly one answer."""
