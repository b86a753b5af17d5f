"""HTTP/1.1 over bytes: bytes in, values out, no I/O."""
