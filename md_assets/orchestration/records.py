"""How Dagster's records are stored where many are: with one commit for what belongs together, or through a connection
that stays open; whichever the instance's storage can do.

Here: what runs, the queue and the audit ask for. Not here: the storage in SQLite (`orchestration.sqlite_records`),
which this imports only when records are stored, for it imports sqlalchemy.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import dagster as dg

RECYCLE_S, MORE_CONNECTIONS = 600, 20
"""Of one to PostgreSQL that stays open: seconds after which it is made anew, and how many may be opened beside it."""


def stored_together(instance: dg.DagsterInstance) -> AbstractContextManager[None]:
    """What this thread stores in the block is stored at its end, as a whole, where the instance can do that; and not at
    all if the block raises."""
    from md_assets.orchestration.sqlite_records import SqliteEvents

    events = instance.event_log_storage
    return events.together() if isinstance(events, SqliteEvents) else nullcontext()


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


_ENGINE = "_engine"
"""Of a storage in PostgreSQL (dagster-postgres 0.29), what makes its connections."""
