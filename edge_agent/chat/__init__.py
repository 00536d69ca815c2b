"""What a prompt and an answer are, the journal that holds both, and the promise of exactly one answer."""
