"""One loaded model: a child process, and the daemon's handle on it."""
