"""Checks: every stage has its own, with names that asset checks may have, and a verdict is a plain value."""

import dataclasses
import pickle
import re

import pytest

from md_assets.core.paths import ARCHIVE_STAGES, Stage
from md_assets.core.verdict import CHECKS_OF_STAGE, Verdict, checks_of


def test_every_stage_that_publishes_archives_has_checks() -> None:
    assert tuple(CHECKS_OF_STAGE) == ARCHIVE_STAGES
    assert all(CHECKS_OF_STAGE.values())


@pytest.mark.parametrize("stage", ARCHIVE_STAGES)
def test_every_stage_counts_first(stage: Stage) -> None:
    assert next(iter(CHECKS_OF_STAGE[stage])) == "counts_balance"


def test_names_and_descriptions_are_what_the_ui_can_show() -> None:
    for checks in CHECKS_OF_STAGE.values():
        for name, says in checks.items():
            assert re.fullmatch(r"[a-z][a-z_]*", name)
            assert says[0].isupper() and says.endswith(".") and "\n" not in says


def test_shards_are_checked_wherever_there_are_shards() -> None:
    assert [stage for stage, checks in CHECKS_OF_STAGE.items() if "shards_intact" in checks] == ["mds", "latents"]


def test_a_verdict_cannot_be_changed_and_comes_whole_through_a_process_border() -> None:
    verdict = Verdict("shards_intact", True, "3 shards, 40 rows", {"rows": 40})
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.passed = False  # type: ignore[misc]
    assert Verdict("x", False, "y").facts == {}


def test_a_subset_has_the_checks_of_its_stage_and_may_be_empty() -> None:
    for stage in ("mds", "latents"):
        whole, part = checks_of(stage), checks_of(stage, "minres512")
        assert whole == CHECKS_OF_STAGE[stage] and list(part) == list(whole)
        assert "not in the subset" in part["counts_balance"]
        assert {name for name in whole if part[name] != whole[name]} == {"counts_balance"}
