"""Accept connections, and stop accepting them without a reset."""

import contextlib
import ctypes
import os
import socket
import struct
from glob import glob
from typing import Any

import gevent
from gevent.server import StreamServer

SO_ATTACH_FILTER = 26  # Linux
REST_SECONDS = 0.001
BPF_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)  # a program of one instruction: return 0, keep nothing


class Listener(StreamServer):
    """A server that accepts in turns with those of the other workers, and that resets no connection when it closes."""

    max_accept = 16  # in a turn
    is_resting = False

    def do_read(self) -> Any:
        """Accept a connection; after a turn, leave the next ones to the other workers for a moment.

        Otherwise the worker that happens to run accepts a whole burst, and the other cores stay idle.
        """
        arrival = super().do_read()
        if arrival and not self.is_resting:
            self.is_resting = True
            self.stop_accepting()
            gevent.spawn_later(REST_SECONDS, self.accept_again)
        return arrival

    def accept_again(self) -> None:
        """Begin the next turn."""
        self.is_resting = False
        if self.started:
            self.start_accepting()

    def close(self) -> None:
        """Stop accepting; to close with connections in the queue would reset them."""
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # out of file descriptors, for example
                if is_held_here_only(self.socket):
                    drop_packets(self.socket)
                while not self.full() and (arrival := self.do_read()):
                    self.do_handle(*arrival)
        super().close()


def is_held_here_only(listener: Any) -> bool:
    """Return whether no other process, such as a worker that goes on, has the socket open (Linux; elsewhere False)."""
    try:
        name = os.readlink(f"/proc/self/fd/{listener.fileno()}")
        os.listdir(f"/proc/{os.getppid()}/fd")  # the master runs as another user: we could not see its sockets
    except OSError:
        return False
    for path in glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(path) == name and path.split("/")[2] != str(os.getpid()):
                return False
    return True


def drop_packets(listener: Any) -> None:
    """Let the kernel drop packets to a listening socket: clients repeat them, and are refused once it is closed."""
    program = ctypes.create_string_buffer(BPF_DROP)
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))
