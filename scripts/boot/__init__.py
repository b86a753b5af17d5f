"""The supervisor's parts: child processes, checks before the start, model files, GPUs."""
