"""Accept connections, and stop accepting them without a reset."""

import contextlib
from os import close as close_at_once  # before gevent replaces it

import gevent
from gevent.server import StreamServer


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn of the event loop.

        It is small while few are open, so that workers get equal shares of a burst, and grows with them, because turns
        become longer.
        """
        return 2 + len(self.pool or ()) // 8

    def close(self) -> None:
        """Serve all connections in the accept queue, then close: closing a queue that is not empty resets them."""
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # out of file descriptors
                while arrival := self.do_read():
                    gevent.spawn(self.handle, *arrival)  # not in the pool, which may be full
            close_at_once(self.socket.detach())  # gevent closes later, and connections could arrive until then
        super().close()
