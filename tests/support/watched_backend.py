"""The mock backend as a process that reports its state: slots, waiters, connections and the requests that it received.

Flags and environment are those of mock_backend.py. The first line on stdout contains the port. Each SIGUSR1 prints
another line: the current state, and the X-Request-Id of each POST since the last line, in order. Run it as a module,
with scripts/ and tests/ on PYTHONPATH.
"""

import asyncio
import json
import os
import signal
import sys

from mock_backend import HttpRequest, MockBackend, Settings, load_settings


class WatchedBackend(MockBackend):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.seen: list[str] = []
        self.connections = 0

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await super().serve_connection(reader, writer)
        finally:
            self.connections -= 1

    async def answer(self, request: HttpRequest) -> None:
        if request.method == "POST":
            self.seen.append(request.fields.get("x-request-id", "-"))
        await super().answer(request)

    def state(self) -> dict[str, object]:
        seen, self.seen = self.seen, []
        held = {
            "backend slots": len(self.busy),
            "backend waiters": self.deferred,
            "sockets at the backend": self.connections,
        }
        return {"held": held, "seen": seen}


def report(value: object) -> None:
    print(json.dumps(value), flush=True)


async def serve() -> None:
    backend = WatchedBackend(load_settings(sys.argv[1:], os.environ))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: report(backend.state()))
    server = await backend.start()
    report({"port": server.sockets[0].getsockname()[1]})
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve())
