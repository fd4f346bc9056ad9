"""Break what protects the service, one thing at a time, and see that its test fails: `make sabotage`.

A test that nobody has seen fail proves nothing. Each sabotage below is made in a copy of the tree, with the test that
is there to notice it. The exit status is 1 where one went unnoticed. `make sabotage ARGS='WORD ...'`: only those whose
test or change has one of the words in it.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ["tests/resilience", "tests/test_proxy.py"]  # the second needs HAProxy


class Sabotage(NamedTuple):
    """A change of one place in a file, and the test of TESTS that must fail of it (pytest's -k)."""

    test: str
    file: str
    old: str
    new: str


SABOTAGES = [
    # Postgres breaks
    Sabotage(
        "killed_under_load",
        "hello.py",
        "statement_timeout = %s;\n    INSERT",
        "statement_timeout = %s; SET LOCAL synchronous_commit = off;\n    INSERT",
    ),
    Sabotage("restarted_while_connections_are_idle", "hello.py", "in (True, False):", "in (False,):"),
    Sabotage(
        "stopped_in_place", "hello.py", "poller.poll(max(0, connection.deadline - monotonic()) * 1000)", "poller.poll()"
    ),
    Sabotage("never_opened", "hello.py", "            self.close()  # now", "            pass  # now"),
    Sabotage("name_server", "hello.py", "lookup.result(deadline - monotonic())", "lookup.result()"),
    Sabotage(
        "locked_is_503 and PUT",
        "hello.py",
        "(round(STATEMENT_TIMEOUT * 1000), usernames, dates, expiry)",
        "(0, usernames, dates, expiry)",
    ),
    Sabotage(
        "locked_is_503 and GET", "hello.py", "(round(STATEMENT_TIMEOUT * 1000), usernames)", "(0, usernames)"
    ),
    Sabotage("table_locked_under_load", "hello.py", "get(timeout=QUEUE_TIMEOUT)", "get()"),
    Sabotage("no_connection_left", "hello.py", "self.connection = connect()", "self.connection = self.connection or connect()"),
    Sabotage("no_connection_left", "hello.py", ', ("Retry-After", "1"))', ")"),
    Sabotage(
        "disk_that_is_full",
        "hello.py",
        "    if isinstance(result := batch.results[place], Exception):",
        "    if isinstance(result := batch.results[place], Exception) and isinstance(row, str):",
    ),
    Sabotage("read_only_database", "hello.py", "find_date_of_birth = Batcher(find)", "find_date_of_birth = Batcher(find)\nFIND_DATES_OF_BIRTH += ' FOR UPDATE'"),
    # What an acknowledgement is worth
    Sabotage("cancelled", "hello.py", "if connection.notices or cursor", "if cursor"),
    Sabotage("standby_that_is_missing", "hello.py", "count(pg_terminate_backend(pid))", "count(pid)"),
    Sabotage("never_overwrites", "hello.py", "to_timestamp(%s)", "to_timestamp(%s + 3600)"),
    # Two hosts
    Sabotage("first_of_two_hosts and refuses", "hello.py", "*found[turn:], *found[:turn]", "found[turn]"),
    Sabotage("meet_a_silent_host", "hello.py", "silent_hosts = first + 1", "silent_hosts = first"),
    Sabotage("first_of_two_hosts and drops", "hello.py", "silent_hosts = first + 1", "silent_hosts = first"),
    Sabotage(
        "standby_promoted or passed_over and standby",
        "hello.py",
        'client_encoding="UTF8",',
        'client_encoding="UTF8", target_session_attrs="any",',
    ),
    Sabotage("becomes_read_only", "hello.py", "                    self.connection.close()", "                    pass"),
    # Processes come and go
    Sabotage("worker_killed", "gunicorn.conf.py", "    mark_process_dead(worker.number)", "    __import__('time').sleep(2)"),
    Sabotage("sigterm", "server/worker.py", "        super().handle_exit(sig, frame)", "        os._exit(0)"),
    Sabotage("sigterm", "server/worker.py", "gevent.spawn_later(DRAIN_SECONDS, self.close_idle)", "pass"),
    Sabotage("went_away", "server/worker.py", "with contextlib.suppress(OSError):  # it went away", "if True:  # it went away"),
    Sabotage("outlasts_the_draining", "server/worker.py", "is_last = is_last or not self.alive", "pass"),
    Sabotage("sighup", "server/worker.py", "        super().handle_exit(sig, frame)", "        os._exit(0)"),
    # Too many, too slow
    Sabotage("thousand_clients", "hello.py", "return self.idle.get(timeout=QUEUE_TIMEOUT)", "return Line()"),
    Sabotage("thousand_clients", "server/worker.py", "            self.parser.feed_data(data)\n", "            self.parser.feed_data(data)\n            sys.warnoptions.append(bytes(range(256)) * 100)\n"),
    Sabotage("arrive_while", "server/worker.py", "HELD[self.number] > least + least // 8", "HELD[self.number] > least"),
    Sabotage("slow_clients", "server/worker.py", "        return self.phase_began + ", "        return 1000 + self.phase_began + "),
    Sabotage("slow_clients", "server/worker.py", "client.settimeout(KEEPALIVE_TIMEOUT", "client.settimeout(1000"),
    Sabotage("without_end and requests", "server/worker.py", "gevent.sleep(YIELD_SECONDS)", "pass"),
    Sabotage("without_end and trailer", "server/worker.py", "        if self.received > MAX_REQUEST_BYTES:", "        if False:"),
    Sabotage("does_not_read", "server/worker.py", "client.settimeout(SEND_TIMEOUT)", "client.settimeout(None)"),
    # Hostile HTTP
    Sabotage("malformed", "server/worker.py", "if hosts != 1:", "if False:"),
    Sabotage("malformed", "server/worker.py", "        self.whole: deque", "        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)\n        self.whole: deque"),
    Sabotage("hidden_in_a_body", "server/worker.py", "        self.content += part\n", "        self.content += part\n        (inner := Reader(self.common)).feed(part)\n        self.whole += inner.whole\n"),
    Sabotage("tolerate", "server/worker.py", '.strip(b" \\t")', ""),
    Sabotage("expects_100", "server/worker.py", "reader.is_expectant = False", "pass"),
    Sabotage("pipelined", "server/worker.py", "reader.whole.popleft()", "reader.whole.pop()"),
    Sabotage("side_by_side", "hello.py", "batch.results[place]", "batch.results[-1]"),
    Sabotage("half_close", "server/worker.py", "(BAD_CONTENT if reader.environ else None)", "None"),
    Sabotage("that_stalls", "server/worker.py", "LATE if reader.target else None", "None"),
    Sabotage("waits_behind", "server/worker.py", "        self.target += part\n", "        self.target += part\n        self.phase_began = monotonic()\n"),
    Sabotage("blank_line", "server/worker.py", "LATE if reader.target else None", "LATE"),
    Sabotage("reset_their_connections", "server/worker.py", "        except OSError:\n            pass  # the client", "        except ZeroDivisionError:\n            pass  # the client"),
    Sabotage("any_name", "hello.py", "except (ValueError, RecursionError):", "except RecursionError:"),
    Sabotage("any_bytes", "hello.py", "except UnicodeError:", "except ZeroDivisionError:"),
    # HAProxy in front
    Sabotage("configuration_has", "compose/scale.yml", "        timeout client 80s\n", ""),
    Sabotage("database_away", "compose/scale.yml", "httpchk GET /livez", "httpchk GET /readyz"),
    Sabotage("stopped_under_load", "compose/scale.yml", "option redispatch 1\n", "\n"),
    Sabotage("no_service_left", "compose/scale.yml", "http-error status 503", "http-error status 403"),
    # Secrets and rights
    Sabotage("tls_to_postgres", "hello.py", 'client_encoding="UTF8",', 'client_encoding="UTF8", sslmode="require", sslrootcert="/nowhere",'),
    Sabotage("may_not", "tests/support/faults.py", "GRANT SELECT, INSERT, UPDATE ON users", "GRANT ALL ON users"),
    Sabotage("process_list", "tests/support/faults.py", '"hello:application"]', '"hello:application", f"--env=X={PASSWORD}"]'),
    Sabotage("no_word_of_a_request", "server/telemetry.py", 'environ.get("hello.route", UNMATCHED)', 'environ["PATH_INFO"]'),
]  # fmt: skip


def notices(sabotage: Sabotage, tree: Path) -> tuple[bool, str]:
    """Return whether the test fails of the sabotage, and what it says."""
    place = tree / sabotage.file
    text = place.read_text()
    place.write_text(text.replace(sabotage.old, sabotage.new))
    command = [sys.executable, "-m", "pytest", *TESTS, "-x", "-k", sabotage.test]
    done = subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True)
    place.write_text(text)
    said = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode == 1, said[0] if said else done.stdout.strip().splitlines()[-1]


def main(words: list[str]) -> int:
    """Make each sabotage; print what came of it; return 1 where one went unnoticed, else 0."""
    chosen = [s for s in SABOTAGES if not words or any(word in "".join(s) for word in words)]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "hello"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        shutil.copy(ROOT / ".env.example", tree)
        for sabotage in chosen:
            began = time.monotonic()
            is_noticed, said = notices(sabotage, tree)
            unnoticed += not is_noticed
            verdict = "noticed  " if is_noticed else "UNNOTICED"
            change = " ".join(sabotage.new.split()) or "(left out)"
            print(
                f"{verdict} {time.monotonic() - began:3.0f} s  {sabotage.test}: {change}\n      {said[:150]}",
                flush=True,
            )
    print(f"{len(chosen)} sabotages, {unnoticed} unnoticed")
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
