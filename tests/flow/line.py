"""A line between a site and the coordinator that a test can cut: a relay on loopback that counts what it carries."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

CHUNK_BYTES = 1 << 16


class Line:
    """Listens on `port` and carries every connection to `target`. `up` counts bytes towards the coordinator."""

    def __init__(self, target: int) -> None:
        self.target, self.up, self.is_cut = target, 0, False
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self.is_cut = True
        self.break_connections()

    def mend(self) -> None:
        self.is_cut = False

    def break_connections(self) -> None:
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if self.is_cut:
                        raise OSError
                    far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                except OSError:
                    near.close()
                    continue
                self._ends |= {near, far}
                threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                sink.sendall(data)
                if upwards:
                    self.up += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._ends.discard(end)
