"""Accept connections, and stop accepting them without a reset."""

import contextlib
from os import close as close_at_once  # before gevent replaces it
from typing import Any

import gevent
from gevent.server import StreamServer

PAUSE_SECONDS = 0.0003  # between two turns of accepting


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    is_paused = False

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn of the event loop: few while few are open, to share a burst."""
        return 2 + len(self.pool or ()) // 8

    def do_read(self) -> Any:
        """Accept a connection; after this turn, pause: the worker that runs first would accept most of a burst."""
        arrival = super().do_read()
        if arrival and not self.is_paused:
            self.is_paused = True
            self.stop_accepting()
            gevent.spawn_later(PAUSE_SECONDS, self.accept_again)
        return arrival

    def accept_again(self) -> None:
        """Begin the next turn."""
        self.is_paused = False
        if self.started:
            self.start_accepting()

    def close(self) -> None:
        """Serve all connections in the accept queue, then close: the last worker to close resets those in it."""
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # out of file descriptors
                while arrival := super().do_read():
                    gevent.spawn(self.handle, *arrival)  # not in the pool, which may be full
            close_at_once(self.socket.detach())  # gevent would close later: what arrives until then would be reset
        super().close()
