"""A result that one request handler waits for. Setting it resumes the handler within the same callback."""

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from core.errors import PeerGone

T = TypeVar("T")


class SupportsResult(Protocol):
    """What gets one result or one error: a Waiter, or an object that acts on it directly."""

    def set_result(self, value: Any) -> None: ...

    def set_exception(self, error: Exception) -> None: ...


class Waiter(Generic[T]):
    """One result, as an asyncio future has it, but `on_done` is called at once, not in the loop's next iteration.

    A second result is ignored: the party that sets it may not know that nothing waits any more. `value` is the result,
    unless `error` is set; `result` returns the one or raises the other.
    """

    __slots__ = ("done", "error", "on_done", "value")
    value: T

    def __init__(self) -> None:
        self.done = False
        self.on_done: Callable[[], None] | None = None
        self.error: BaseException | None = None

    def set_result(self, value: T) -> None:
        if not self.done:
            self.done = True
            self.value = value
            if self.on_done is not None:
                self.on_done()

    def set_exception(self, error: BaseException) -> None:
        if not self.done:
            self.done = True
            self.error = error
            if self.on_done is not None:
                self.on_done()

    def result(self) -> T:
        """Return the result or raise the error. Call it once."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: kept here or in the waiter, it would be a cycle
        return self.value

    async def wait(self) -> T:
        """Wait in an asyncio task. Request handlers are no tasks: they use ClientProtocol.wait."""
        if not self.done:
            event = asyncio.Event()
            self.on_done = event.set
            await event.wait()
        return self.result()

    def copy_from(self, future: "asyncio.Future[T]") -> None:
        """Take the outcome of an asyncio future that is done (a callback for `add_done_callback`)."""
        if future.cancelled():
            self.set_exception(PeerGone())
            return
        error = future.exception()
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(future.result())
