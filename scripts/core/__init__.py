"""Parts that every program shares: errors and their dialects, logs, signals, the file descriptor limit."""
