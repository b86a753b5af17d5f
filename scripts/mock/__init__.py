"""Parts of mock_backend.py."""
