"""Memory in which each worker keeps its last snapshot, for all workers to read.

It is a file without a name, which gunicorn's master opens and its workers inherit. So no other program can fill, remove
or damage it, and the kernel frees it with the last of these processes.
"""

import os
import zlib
from struct import Struct

HEADER = Struct("=QQQ")  # sequence number, bytes of content, checksum
# A worker has two areas, and overwrites the older one: if it is killed while it writes, the other one is whole.
AREAS = 2
AREA_BYTES = 4 * 1024 * 1024  # far above any snapshot; what was never written takes no memory


class Snapshots:
    """One snapshot for each worker number, from 1 up."""

    def __init__(self) -> None:
        self.file = os.memfd_create("hello-metrics")

    def write(self, number: int, content: bytes) -> None:
        """Replace the snapshot of a worker; raise OSError if that is impossible."""
        sequence = self.newest(number)[0] + 1
        record = HEADER.pack(sequence, len(content), zlib.crc32(content)) + content
        os.pwrite(self.file, record, area_offset(number, sequence))

    def read(self, number: int) -> bytes:
        """Return the snapshot of a worker; empty if there is none."""
        return self.newest(number)[1]

    def numbers(self) -> range:
        """Return the numbers of all workers there were."""
        size = os.fstat(self.file).st_size
        return range(1, size // area_offset(1, 0) + 1)

    def newest(self, number: int) -> tuple[int, bytes]:
        """Return the sequence number and the content of a worker's newest whole record."""
        return max(self.record(area_offset(number, area)) for area in range(AREAS))

    def record(self, offset: int) -> tuple[int, bytes]:
        """Return the sequence number and the content of a record; (0, b"") if it is not whole."""
        header = os.pread(self.file, HEADER.size, offset)
        if len(header) < HEADER.size:
            return 0, b""
        sequence, size, checksum = HEADER.unpack(header)
        content = os.pread(self.file, size, offset + HEADER.size)
        is_whole = zlib.crc32(content) == checksum
        return (sequence, content) if is_whole else (0, b"")


def area_offset(number: int, sequence: int) -> int:
    """Return where the record with a sequence number begins."""
    return (number * AREAS + sequence % AREAS) * AREA_BYTES
