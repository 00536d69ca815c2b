"""One loaded model: a child process that answers prompts, golden ones too, and the daemon's handle on it."""
