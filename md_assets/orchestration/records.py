"""How Dagster's records are stored where there are many: with one commit for what belongs together, through connections
that stay open.

Here: what runs, the queue and the audit ask for, and the gathering of events. Not here: the storages that it is for,
which `deploy` names: `orchestration.sqlite_records` and `orchestration.postgres_records`.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import dagster as dg
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.event_log import SqlEventLogStorage
from sqlalchemy import Connection

RECYCLE_S, MORE_CONNECTIONS = 600, 20
"""Of one to PostgreSQL that stays open: seconds after which it is made anew, and how many may be opened beside it."""

_ENGINE = "_engine"
"""Of a storage in PostgreSQL (dagster-postgres 0.29), what makes its connections."""

BATCH_VARIABLE, BATCH_EVENTS = "DAGSTER_EVENT_BATCH_SIZE", "1000"
"""By this variable Dagster is told that the events of a run's creation, one for each archive, may go together."""


class GatheredEvents(SqlEventLogStorage):
    """An event log that stores each event, or those that a thread has gathered, with one commit, and asks no more for
    tables and columns that it has found. To be mixed into a storage, by a class that gives `_one_commit`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._gathered = threading.local()
        self._there: set[str] = set()
        os.environ.setdefault(BATCH_VARIABLE, BATCH_EVENTS)
        super().__init__(*args, **kwargs)

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `stored_together`. Nothing is locked meanwhile: another thread that logs may hold what this one needs."""
        if self._of_this_thread() is not None:
            yield
            return
        events = self._gathered.events = list[EventLogEntry]()
        try:
            yield
        finally:
            self._gathered.events = None
        self.store_event_batch(events)

    def store_event(self, event: EventLogEntry) -> None:
        self.store_event_batch([event])

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Store all of them, or none."""
        gathered = self._of_this_thread()
        if gathered is not None:
            gathered.extend(events)
            return
        with self._one_commit():
            for event in events:
                super().store_event(event)  # of the storage that this is mixed into

    def has_table(self, table_name: str) -> bool:
        """Whether there is such a table."""
        if table_name not in self._there and super().has_table(table_name):  # type: ignore[safe-super]
            self._there.add(table_name)
        return table_name in self._there

    def _has_asset_key_col_on_connection(self, conn: Connection, column_name: str) -> bool:
        column = f"asset_keys.{column_name}"
        if column not in self._there and super()._has_asset_key_col_on_connection(conn, column_name):
            self._there.add(column)
        return column in self._there

    def _of_this_thread(self) -> list[EventLogEntry] | None:
        """Events that wait for the end of a block of `together`; None outside of one."""
        return getattr(self._gathered, "events", None)

    def _one_commit(self) -> AbstractContextManager[None]:
        """What this thread stores in the block is committed at its end; nothing of it if the block raises."""
        raise NotImplementedError


def stored_together(instance: dg.DagsterInstance) -> AbstractContextManager[None]:
    """What this thread stores in the block is stored at its end, as a whole, where the instance can do that; and not at
    all if the block raises."""
    events = instance.event_log_storage
    return events.together() if isinstance(events, GatheredEvents) else nullcontext()


def keep_connection(instance: dg.DagsterInstance) -> None:
    """Have this process keep a connection to PostgreSQL instead of making up to five for each event that it stores;
    with SQLite do nothing. Dagster has that for its webserver; statements may take as long as they do elsewhere.

    For processes that have one instance. Where each piece of work has an instance of its own, see `kept_connection`.
    """
    instance.optimize_for_webserver(statement_timeout=0, pool_recycle=RECYCLE_S, max_overflow=MORE_CONNECTIONS)


@contextmanager
def kept_connection(instance: dg.DagsterInstance) -> Iterator[None]:
    """`keep_connection` for the time of a block, at whose end it is closed.

    A code server makes an instance for each tick of a sensor and lets go of it without closing what it holds.
    """
    storages = [instance.event_log_storage, instance.run_storage, instance.schedule_storage]
    before = [(storage, vars(storage)[_ENGINE]) for storage in storages if storage and _ENGINE in vars(storage)]
    keep_connection(instance)
    try:
        yield
    finally:
        for storage, engine in before:
            kept = vars(storage)[_ENGINE]
            if kept is not engine:
                setattr(storage, _ENGINE, engine)
                kept.dispose()
