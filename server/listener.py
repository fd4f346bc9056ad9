"""Accept connections, and stop accepting them without a reset."""

import contextlib
from typing import Any

import gevent
from gevent.server import StreamServer

PAUSE_SECONDS = 0.001  # without it, one of two workers often takes 30 of 32 connections that arrive together


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    is_paused = False

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn of the event loop: few while few are open, to share a burst."""
        return 1 + len(self.pool or ()) // 8

    def do_handle(self, *arrival: Any) -> None:
        """Serve a connection; leave those after this turn to the other workers for a moment."""
        super().do_handle(*arrival)
        if not self.is_paused:
            self.is_paused = True
            self.stop_accepting()
            gevent.spawn_later(PAUSE_SECONDS, self.accept_again)

    def accept_again(self) -> None:
        """End the pause."""
        self.is_paused = False
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
