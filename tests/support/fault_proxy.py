"""A TCP proxy between the service and Postgres whose connections tests can hold, cut and silence."""

import contextlib
import socket
import threading
from typing import Self

from tests.support.network import LOOPBACK, RESET_ON_CLOSE


class Link:
    """One proxied connection: two threads pass its bytes on."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.lock = threading.Lock()
        self.is_held = self.is_cut = False
        self.drops_requests = self.drops_replies = False
        self.held = b""
        self.threads = [threading.Thread(target=call, daemon=True) for call in (self.send, self.reply)]

    def send(self) -> None:
        """Pass on what the client sends."""
        with contextlib.suppress(OSError):
            while data := self.client.recv(65536):
                with self.lock:
                    if self.is_held:
                        self.held += data
                    elif not self.drops_requests:
                        self.server.sendall(data)
        with self.lock, contextlib.suppress(OSError):
            if not (self.is_held or self.drops_requests):
                self.server.shutdown(socket.SHUT_WR)

    def reply(self) -> None:
        """Pass on what the server sends."""
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                if not (self.drops_replies or self.is_cut):
                    self.client.sendall(data)
        if not self.drops_replies:
            self.end(self.client)

    @staticmethod
    def end(side: socket.socket) -> None:
        """End a connection in both directions; the thread that reads from it then ends, too."""
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset the client's connection."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.end(self.client)
        self.threads[0].join()
        self.client.close()

    def deliver(self) -> None:
        """Send what was held; after a cut, also wait until the server has done it and left."""
        with self.lock, contextlib.suppress(OSError):
            self.is_held = False
            self.server.sendall(self.held)
            self.held = b""
            if self.is_cut:
                self.server.shutdown(socket.SHUT_WR)
        if self.is_cut:
            self.threads[1].join(20)


class FaultProxy:
    """A TCP proxy; a context manager that listens on `port` of 127.0.0.1.

    A statement that arrives late: `hold()`, send it, wait until `held`, `cut()`, do other things, `deliver()`.

    Args:
        target: the server's port on 127.0.0.1, or the path of its Unix socket.
    """

    def __init__(self, target: int | str) -> None:
        self.target = target
        self.links: list[Link] = []
        self.drops_requests = self.drops_replies = False

    def __enter__(self) -> Self:
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        Link.end(self.listener)
        self.listener.close()
        self.thread.join()
        for link in self.links:
            for side in (link.client, link.server):
                Link.end(side)
                side.close()

    def accept(self) -> None:
        """Connect each client with the server; close its connection where the server refuses."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.socket(socket.AF_INET if isinstance(self.target, int) else socket.AF_UNIX)
                try:
                    server.connect((LOOPBACK, self.target) if isinstance(self.target, int) else self.target)
                except OSError:
                    client.close()
                    continue
                link = Link(client, server)
                link.drops_requests, link.drops_replies = self.drops_requests, self.drops_replies
                self.links.append(link)
                for thread in link.threads:
                    thread.start()

    def hold(self) -> None:
        """Keep what the clients of the present connections send."""
        for link in self.links:
            link.is_held = True

    @property
    def held(self) -> int:
        """The number of bytes that are kept."""
        return sum(len(link.held) for link in self.links)

    def cut(self) -> None:
        """Reset the present connections on the client's side only."""
        for link in self.links:
            link.cut()

    def deliver(self) -> None:
        """Send what was kept; for connections that were cut, return when the server has done it."""
        for link in self.links:
            link.deliver()

    def drop(self, *, requests: bool, replies: bool) -> None:
        """Choose what is not passed on, on present and later connections."""
        self.drops_requests, self.drops_replies = requests, replies
        for link in self.links:
            link.drops_requests, link.drops_replies = requests, replies

    def drop_replies(self) -> None:
        """Pass requests on, and no reply."""
        self.drop(requests=False, replies=True)

    def blackhole(self) -> None:
        """Pass nothing on, in either direction."""
        self.drop(requests=True, replies=True)

    def heal(self) -> None:
        """Pass everything on again, and what was kept."""
        self.drop(requests=False, replies=False)
        self.deliver()
