"""The HTTP server of the stubs. To import http.server takes longer than all that they do."""

import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

Respond = Callable[[str, Mapping[str, str]], tuple[int, bytes]]


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address, or at the path of a Unix socket."""
    if host.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(host)
        listener.listen()
        return listener
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def serve(listener: socket.socket, respond: Respond) -> None:
    """Serve until the listener is shut down. `respond` gets the path of a GET and its fields, with names in lower case.

    Each connection has a thread and one response.
    """
    with suppress(OSError):
        while True:
            threading.Thread(target=_serve_connection, args=(listener.accept()[0], respond), daemon=True).start()


def _serve_connection(connection: socket.socket, respond: Respond) -> None:
    # A probe may reset the connection once it has the response.
    with connection, connection.makefile("rb") as file, suppress(OSError):
        method, _, target = file.readline().decode("latin-1").partition(" ")
        lines = iter(lambda: file.readline().decode("latin-1").strip(), "")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        file.read(int(fields.get("content-length", "0")))
        if method:
            status, body = respond(target.partition(" ")[0], fields) if method == "GET" else (501, b"")
            connection.sendall(b"HTTP/1.0 %d Stub\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
