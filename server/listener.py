"""Accept connections, and stop accepting them without a reset."""

import contextlib
import ctypes
import os
import socket
import struct
from glob import glob
from typing import Any

from gevent.server import StreamServer

SO_ATTACH_FILTER = 26  # Linux
BPF_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)  # a program of one instruction: return 0, keep nothing


class Listener(StreamServer):
    """A server that, when it closes, first accepts the connections that the kernel has completed."""

    max_accept = 16  # in a round of the event loop, which is long under load

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
