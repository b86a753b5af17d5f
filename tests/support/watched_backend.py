"""The mock backend as a process that can be looked into: it remembers whose requests it saw, in order.

Flags and knobs are those of mock_backend.py. The first line on stdout tells the port; each SIGUSR1 brings another line:
what is at work just then, and the X-Request-Id of every POST since the last. Run as a module, with scripts/ and tests/
on PYTHONPATH.
"""

import asyncio
import json
import os
import signal
import sys

from mock_backend import Exchange, MockBackend, Settings, load_settings


class WatchedBackend(MockBackend):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.seen: list[str] = []
        self.connections = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await super()._serve(reader, writer)
        finally:
            self.connections -= 1

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.method == "POST":
            self.seen.append(exchange.fields.get("x-request-id", "-"))
        await super()._answer(exchange)

    def look(self) -> dict[str, object]:
        seen, self.seen = self.seen, []
        held = {
            "backend slots": len(self.busy),
            "backend waiters": self.deferred,
            "sockets at the backend": self.connections,
        }
        return {"held": held, "seen": seen}


def tell(news: object) -> None:
    print(json.dumps(news), flush=True)


async def serve() -> None:
    backend = WatchedBackend(load_settings(sys.argv[1:], os.environ))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: tell(backend.look()))
    server = await backend.start()
    tell({"port": server.sockets[0].getsockname()[1]})
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve())
