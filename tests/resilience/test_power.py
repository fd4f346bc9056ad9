"""The power fails: what was not flushed to the disk is gone."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.load import Load
from tests.support.postgres import Database, temporary_folder
from tests.support.service import SHORT_TIMEOUTS, Service


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Disk:
    """A file system in an image file; what is in the kernel's cache only is not in the image."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "image"
        self.mounted = folder / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as image:
            image.truncate(400_000_000)
        run("mkfs.ext4", "-q", self.image)
        self.mount()

    def mount(self) -> None:
        """Mount the image; `commit`: the kernel flushes nothing by itself for 10 minutes."""
        run("mount", "-o", "loop,commit=600", self.image, self.mounted)

    def unmount(self) -> None:
        run("umount", self.mounted)

    def cut_power(self, database: Database) -> None:
        """Kill the database and lose what the image does not have at this moment."""
        with database.suspended():
            run("cp", "--sparse=always", self.image, self.image.with_suffix(".cut"))
            database.kill()
        self.unmount()
        self.image.with_suffix(".cut").replace(self.image)
        self.mount()


@pytest.fixture
def disk() -> Iterator[Disk]:
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("only root can mount a file system, and this needs mkfs.ext4")
    folder = temporary_folder()
    try:
        disk = Disk(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"loop devices cannot be mounted here: {error.stderr.decode().strip()}")
    yield disk
    with contextlib.suppress(subprocess.CalledProcessError):
        disk.unmount()
    shutil.rmtree(folder)


@pytest.fixture
def database(disk: Disk) -> Iterator[Database]:
    server = Database(disk.mounted / "data", fsync="on")
    server.start()
    server.prepare()
    run("sync", "--file-system", disk.mounted)  # the data folder is a copy, which nothing has flushed yet
    yield server
    server.stop()


def test_power_cut_under_load_loses_no_acknowledged_put(
    disk: Disk, database: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    unflushed = disk.mounted / "unflushed"
    with Service(tmp_path, database.service_environment, **SHORT_TIMEOUTS) as service:
        with Load(service, database) as load:
            load.wait_for_answers(300)
            unflushed.write_text("in the kernel's cache only")
            disk.cut_power(database)
            load.wait_for_answers(16, [503])
            database.start()
            load.wait_for_answers(100)
        report(load.report())
    assert not unflushed.exists()
