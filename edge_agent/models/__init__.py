"""The model cache: what is registered, what is here, what is active."""
