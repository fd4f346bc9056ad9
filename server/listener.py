"""Accept connections, and stop accepting them without a reset."""

import contextlib
import ctypes
import os
import socket
import struct
from os import close as close_at_once  # before gevent replaces it
from pathlib import Path
from typing import Any

import gevent
from gevent.server import StreamServer

SO_ATTACH_FILTER = 26  # Linux
PAUSE_SECONDS = 0.0003  # between two turns of accepting
HANDSHAKE_SECONDS = 0.1  # time for TCP handshakes in progress to complete
# A classic BPF program: load the TCP flags; drop a packet with SYN and without ACK, keep every other one.
DROP_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]


class Listener(StreamServer):
    """A gevent server that shares new connections with the other workers, and closes without resetting any."""

    is_paused = False

    @property
    def max_accept(self) -> int:  # type: ignore[override]
        """The number of connections to accept in a turn: few while few are open, so that workers get equal shares."""
        return 2 + len(self.pool or ()) // 8

    def do_read(self) -> Any:
        """Accept a connection; after a turn, leave the next ones to the other workers for a moment.

        Otherwise the worker that happens to run accepts a whole burst, and the other cores stay idle.
        """
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
        """Serve the connections in the accept queue, then close: closing a queue that is not empty resets them."""
        if self.started:
            self.stop_accepting()
            if is_closed_by_master(self.socket):
                with contextlib.suppress(OSError):  # socket filters are not permitted
                    ignore_new_connections(self.socket)
                gevent.sleep(HANDSHAKE_SECONDS)
            with contextlib.suppress(OSError):  # out of file descriptors
                while not self.full() and (arrival := super().do_read()):
                    self.do_handle(*arrival)
            close_at_once(self.socket.detach())  # gevent closes later, and connections could arrive until then
        super().close()


def is_closed_by_master(listener: Any) -> bool:
    """Return whether gunicorn's master has closed the socket, as it does before it stops all workers (Linux)."""
    links = set()
    with contextlib.suppress(OSError):
        name = os.readlink(f"/proc/self/fd/{listener.fileno()}")
        for path in Path(f"/proc/{os.getppid()}/fd").iterdir():
            links.add(os.readlink(path))
    return bool(links) and name not in links


def ignore_new_connections(listener: Any) -> None:
    """Make the kernel drop SYN packets: clients repeat them, and are refused once the socket is closed."""
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in DROP_SYN))
    description = struct.pack("@HP", len(DROP_SYN), ctypes.addressof(program))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, description)
