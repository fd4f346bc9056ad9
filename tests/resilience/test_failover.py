"""A standby is promoted while its primary lives, is cut off or frozen; each user's history must be linearizable."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.network import LOOPBACK
from tests.support.registers import NOON, Registers
from tests.support.replication import Pair, replicated
from tests.support.service import SHORT_TIMEOUTS, Service
from tests.support.wait import in_thread, wait_until

# QUEUE_TIMEOUT + DATABASE_TIMEOUT of SHORT_TIMEOUTS, an attempt to connect, and a margin for a busy machine.
IN_TIME = 0.375 + 0.75 + 0.25 + 2
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'hello'"
REPLAYED = "SELECT pg_last_wal_replay_lsn() = pg_last_wal_receive_lsn()"
NOT_WAITING = f"{SESSIONS} AND wait_event IS DISTINCT FROM 'SyncRep'"


class Cluster:
    """A primary, its synchronous standby, and two instances of the service that reach both through proxies.

    Each instance is one process: so its GETs and PUTs are those of a process.
    """

    def __init__(self, pair: Pair, stack: contextlib.ExitStack, folder: Path) -> None:
        self.primary, self.standby, self.replication = pair
        self.paths: list[FaultProxy] = []  # from the instances to the primary
        self.services: list[Service] = []
        for _ in range(2):
            path, other = (stack.enter_context(FaultProxy(server.port)) for server in (self.primary, self.standby))
            self.paths.append(path)
            hosts = self.primary.hosts((LOOPBACK, path.port), (LOOPBACK, other.port))
            settings = SHORT_TIMEOUTS | {"PGTARGETSESSIONATTRS": "read-write", "WEB_CONCURRENCY": "1", "TZ": NOON}
            self.services.append(Service(folder, hosts, **settings))
        starting = [in_thread(stack.enter_context, service) for service in self.services]
        for future in starting:
            future.result()

    def cut_replication(self) -> None:
        """Cut the standby off from the primary."""
        self.replication.blackhole()

    def fence(self) -> None:
        """Cut the instances off from the primary."""
        for path in self.paths:
            path.blackhole()

    def promote(self, load: Registers) -> float:
        """Record what the standby has, and promote it; return when it accepted writes."""
        wait_until(lambda: self.standby.query(REPLAYED) == [(True,)])
        load.record(self.standby)
        assert self.standby.query("SELECT pg_promote()") == [(True,)]
        return time.monotonic()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with replicated() as pair, contextlib.ExitStack() as stack:
        yield Cluster(pair, stack, tmp_path)


def test_primary_that_is_cut_off_leaves_histories_linearizable(cluster: Cluster) -> None:
    with Registers(cluster.services) as load:
        load.wait_for_successes(10)
        cluster.fence()
        cluster.cut_replication()
        os.kill(cluster.services[1].workers()[0], signal.SIGKILL)  # its PUTs get no answer: they may be stored or not
        wait_until(cluster.services[1].is_up)
        load.wait_for_failures(1)
        promoted = cluster.promote(load)
        load.wait_for_successes(10)
    load.record(cluster.standby)
    load.check_linearizable()
    load.check_nothing_lost(cluster.primary)
    assert load.last_failure < promoted + IN_TIME


def fence_and_promote_later(cluster: Cluster, load: Registers) -> float:
    """Let PUTs fail and GETs succeed, then fence the primary and promote the standby; return when."""
    load.wait_for_failures(2, load.writers)
    load.wait_for_successes(10, load.readers)
    cluster.fence()
    load.wait_for_failures(1, load.readers)
    return cluster.promote(load)


def test_primary_that_is_fenced_after_it_lost_its_standby_leaves_histories_linearizable(cluster: Cluster) -> None:
    with Registers(cluster.services) as load:
        load.wait_for_successes(10)
        cluster.cut_replication()
        promoted = fence_and_promote_later(cluster, load)
        load.wait_for_successes(10)
    load.record(cluster.standby)
    load.check_nothing_lost(cluster.primary)
    load.check_linearizable(in_doubt_until=promoted)  # the standby may have commits that it could not confirm
    assert load.last_failure < promoted + IN_TIME


def test_put_answered_503_whose_commit_the_standby_could_not_confirm_takes_effect_with_the_promotion(
    cluster: Cluster,
) -> None:
    with Registers(cluster.services) as load:
        load.wait_for_successes(10)
        cluster.replication.drop(requests=True, replies=False)  # the standby gets all commits, and confirms none
        promoted = fence_and_promote_later(cluster, load)
        load.wait_for_successes(10)
    load.record(cluster.standby)
    load.check_nothing_lost(cluster.primary)
    load.check_linearizable(in_doubt_until=promoted)
    with pytest.raises(AssertionError, match="contradict"):
        load.check_linearizable()


def test_primary_that_is_frozen_and_resumed_after_the_promotion_undoes_nothing(cluster: Cluster) -> None:
    with Registers(cluster.services) as load:
        load.wait_for_successes(10)
        with cluster.primary.suspended():
            load.wait_for_failures(1)
            promoted = cluster.promote(load)
            load.wait_for_successes(10)
            cluster.fence()
        load.wait_for_successes(10)
    load.record(cluster.standby)
    load.check_nothing_lost(cluster.primary)
    load.check_linearizable()
    assert load.last_failure < promoted + IN_TIME


def test_standby_promoted_beside_its_living_primary_has_every_write_and_get_follows_put(cluster: Cluster) -> None:
    with Registers(cluster.services) as load:
        load.wait_for_successes(10)
        cluster.cut_replication()
        load.wait_for_failures(4, load.writers)
        load.wait_for_successes(10, load.readers)
        [(sessions,)] = cluster.primary.query(SESSIONS)
        promoted = cluster.promote(load)
        load.wait_for_successes(10)
        wait_until(lambda: cluster.primary.query(NOT_WAITING) == [(0,)])
    load.record(cluster.standby)
    with Registers(cluster.services) as later:
        later.wait_for_successes(10)
    later.record(cluster.standby)
    load.check_nothing_lost(cluster.primary)
    later.check_linearizable()
    assert load.last_failure < promoted + IN_TIME
    assert sessions <= 2 * (2 + 1)  # of two processes: one for GET, one for PUT, and one whose commit waits
