"""The way of a request through the gateway, and the composition root that connects all parts."""
