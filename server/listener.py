"""Accept connections, and stop accepting them without a reset."""

import contextlib
from time import monotonic
from typing import Any

import gevent
from gevent.server import StreamServer

PAUSE_SECONDS = 0.001  # without it, one of two workers often takes 30 of 32 connections that arrive together
NOTE_SECONDS = 0.05  # a burst is what arrives in this time


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    noted = 0.0  # monotonic seconds
    open_then = 0  # connections

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn of the event loop: few while few are open, to share a burst."""
        return 1 + len(self.pool or ()) // 8

    def do_handle(self, *arrival: Any) -> None:
        """Serve a connection; in a burst, leave the next ones to the other workers for a moment."""
        if monotonic() > self.noted + NOTE_SECONDS:
            self.noted, self.open_then = monotonic(), len(self.pool or ())
        super().do_handle(*arrival)
        if len(self.pool or ()) > 1 + 2 * self.open_then:  # not if each request has a connection of its own
            self.stop_accepting()
            gevent.spawn_later(PAUSE_SECONDS, self.accept_again)

    def accept_again(self) -> None:
        """End the pause."""
        if self.started:
            self.start_accepting()

    def close(self) -> None:
        """Serve all connections in the accept queue, then close: the last worker to close resets those in it."""
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # out of file descriptors
                while arrival := self.do_read():
                    gevent.spawn(self.handle, *arrival)  # not in the pool, which may be full
        super().close()
