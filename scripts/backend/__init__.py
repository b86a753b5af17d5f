"""The state of llama-server: readiness, slots, its own metrics."""
