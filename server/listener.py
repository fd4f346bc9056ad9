"""Accept connections, and stop accepting them without a reset."""

import contextlib

import gevent
from gevent.server import StreamServer


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn of the event loop: few while few are open, to share a burst."""
        return 1 + len(self.pool or ()) // 8

    def close(self) -> None:
        """Serve all connections in the accept queue, then close: the last worker to close resets those in it."""
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # out of file descriptors
                while arrival := self.do_read():
                    gevent.spawn(self.handle, *arrival)  # not in the pool, which may be full
        super().close()
