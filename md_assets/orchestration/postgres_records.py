"""Dagster's records in PostgreSQL, with one commit for what belongs together.

Dagster's own storage commits each of the four to six statements by which it stores an event, and each commit waits for
the disk. Tables and durability are Dagster's: an instance can change from one to the other at any time.

Here: how events reach the database. Not here: connections that stay open (`orchestration.records.keep_connection`).
`deploy/dagster.postgres.yaml` names this storage.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage, PostgresEventLogStorage
from dagster_postgres.utils import get_token_provider_from_config, pg_url_from_config
from sqlalchemy import Connection

from md_assets.orchestration.records import GatheredEvents

DELAY_VARIABLE, DELAY_S = "ASSET_BACKFILL_CURSOR_DELAY_TIME", "2"
"""By this variable Dagster's daemon is told how long, in whole seconds, events may be on their way. An event has its
number before it is committed: a look at a backfill that sees a later one would pass it over for ever, and what follows
its archive would never be asked for."""


class PostgresRecords(DagsterPostgresStorage):
    """Dagster's PostgreSQL storage, with an event log of `PostgresEvents`.

    Args:
        postgres_url: as in Dagster's own, like all others.
    """

    def __init__(self, postgres_url: str, should_autocreate_tables: bool = True, **more: Any) -> None:
        super().__init__(postgres_url, should_autocreate_tables, **more)
        os.environ.setdefault(DELAY_VARIABLE, DELAY_S)
        token_provider = more.get("token_provider")
        self._event_log_storage = PostgresEvents(postgres_url, should_autocreate_tables, token_provider=token_provider)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> "PostgresRecords":
        return cls(
            pg_url_from_config(config_value),
            config_value.get("should_autocreate_tables", True),
            inst_data=inst_data,
            token_provider=get_token_provider_from_config(config_value),
        )


class PostgresEvents(GatheredEvents, PostgresEventLogStorage):
    """Dagster's event log in PostgreSQL, which stores an event, or a batch of them, with one commit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batch = threading.local()
        super().__init__(*args, **kwargs)

    @contextmanager
    def _one_commit(self) -> Iterator[None]:
        with super()._connect() as connection:
            of_batch = connection.execution_options(isolation_level="READ COMMITTED")
            with of_batch.begin():
                self._batch.connection = of_batch
                try:
                    yield
                finally:
                    self._batch.connection = None

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        of_batch: Connection | None = getattr(self._batch, "connection", None)
        if of_batch is not None:
            yield of_batch
            return
        with super()._connect() as connection:
            yield connection
