"""Connections to clients and to the backend. Only this room touches sockets."""
