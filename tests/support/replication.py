"""A primary, and a standby that each of its commits waits for."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.fault_proxy import FaultProxy
from tests.support.network import LOOPBACK, free_port
from tests.support.postgres import Database
from tests.support.wait import wait_until


class Pair(NamedTuple):
    """A primary, its synchronous standby, and the proxy through which the standby replicates."""

    primary: Database
    standby: Database
    replication: FaultProxy


@contextlib.contextmanager
def replicated() -> Iterator[Pair]:
    """Yield a primary and a standby on 127.0.0.1; each commit waits for the standby."""
    primary, standby = (Database(listen_addresses=LOOPBACK, port=str(free_port())) for _ in range(2))
    with contextlib.ExitStack() as stack:
        stack.callback(primary.stop)
        primary.start()
        primary.prepare()
        stack.callback(standby.stop)
        standby.folder.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(standby.folder, "nobody")
        replication = stack.enter_context(FaultProxy(primary.port))  # ends first: a primary waits for its standby
        where = ["-h", LOOPBACK, "-p", str(replication.port), "-U", "postgres", "-D", str(standby.folder)]
        primary.call("pg_basebackup", *where, "-R", "-c", "fast", "--no-sync")
        standby.start()
        wait_until(lambda: primary.query("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"))
        primary.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.query("SELECT pg_reload_conf()")
        wait_until(lambda: primary.query("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        yield Pair(primary, standby, replication)
