"""Dagster's records in SQLite, through connections that stay open and with one commit for what belongs together.

Dagster's own storage opens and closes a connection for each of the one to four transactions in which it stores an
event, and asks the database for its tables each time: four fifths of what an archive cost a run (decisions/016). Files,
tables and durability are Dagster's: an instance can change from one to the other at any time.

Here: how events reach their files. Not here: which events there are, nor their files. `deploy/dagster.yaml` names this
storage.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dagster._core.storage.event_log.polling_event_watcher import SqlPollingEventWatcher
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.pool import QueuePool

from md_assets.orchestration.records import GatheredEvents

BUSY_S = 60.0
"""So long a connection waits for another process that writes."""

RUNS_OPEN = 8
"""Logs of runs that stay open beside the index: a run has one, the daemon and the webserver come and go."""


class SqliteRecords(DagsterSqliteStorage):
    """Dagster's SQLite storage, with an event log of `SqliteEvents`.

    Args:
        base_dir: as in Dagster's own; `$DAGSTER_HOME` has what was stored by that.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = SqliteEvents(os.path.join(base_dir, "history", "runs", ""))  # noqa: PTH118 (as it does)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> "SqliteRecords":
        return cls.from_local(inst_data=inst_data, **config_value)


class SqliteEvents(GatheredEvents, SqliteEventLogStorage):
    """Dagster's event log in SQLite, whose connections stay open."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._watcher: SqlPollingEventWatcher | None = None
        self._transaction: tuple[ExitStack, dict[str, Connection]] | None = None
        super().__init__(base_dir, inst_data)
        self._db_lock: Any = threading.RLock()  # one connection at a time, of one thread

    @contextmanager
    def _one_commit(self) -> Iterator[None]:
        """One for each file."""
        with self._db_lock, ExitStack() as stack:
            self._transaction = stack, {}
            stack.callback(setattr, self, "_transaction", None)
            yield

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            if self._transaction is None:
                with self._engine(shard).connect() as connection, connection.begin():
                    yield connection
                return
            stack, connections = self._transaction
            if shard not in connections:
                connections[shard] = stack.enter_context(self._engine(shard).connect())
                stack.enter_context(connections[shard].begin())
            yield connections[shard]

    def _engine(self, shard: str) -> Engine:
        engine = self._engines.pop(shard, None)
        if engine is None:
            engine = create_engine(
                self.conn_string_for_shard(shard),
                poolclass=QueuePool,
                pool_size=1,
                connect_args={"timeout": BUSY_S, "check_same_thread": False},
            )
        self._engines[shard] = engine
        if shard not in self._initialized_dbs:
            self._initdb(engine)
            self._initialized_dbs.add(shard)
        runs = [name for name in self._engines if name != INDEX_SHARD_NAME]
        for name in runs[:-RUNS_OPEN]:
            self._engines.pop(name).dispose()
        return engine

    def watch(self, run_id: str, cursor: str | None, callback: Callable[..., Any]) -> None:
        """Call back for each new event of a run. Dagster's own waits for changes of the file, which come late where a
        connection stays open."""
        if self._watcher is None:
            self._watcher = SqlPollingEventWatcher(self)
        self._watcher.watch_run(run_id, cursor, callback)

    def end_watch(self, run_id: str, handler: Callable[..., Any]) -> None:
        if self._watcher is not None:
            self._watcher.unwatch_run(run_id, handler)

    def dispose(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        with self._db_lock:
            while self._engines:
                self._engines.popitem()[1].dispose()
        super().dispose()
