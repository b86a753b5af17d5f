"""The credential with which the supervisor reads all of the gateway's /health: when it was idle, and since when."""

from hashlib import sha256


def health_token(backend_key: str) -> str:
    """Return the token. It follows from the backend's key, which both processes have, and is no use at the backend."""
    return sha256(b"health:" + backend_key.encode()).hexdigest()
