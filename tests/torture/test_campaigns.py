"""A fast sample of each campaign; `make torture` runs them at length."""

import random

import pytest

from tests.torture import archives, cache, images, runs, weights


@pytest.mark.parametrize(("campaign", "most"), [(images, 112), (cache, 12), (weights, 16), (archives, 30)])
def test_a_sample_of_a_campaign_has_no_failure_and_is_repeated_by_its_seed(campaign, most, tmp_path):
    outcomes = list(campaign.campaign(7, 60, tmp_path, most))
    assert len(outcomes) == most
    assert [outcome for outcome in outcomes if outcome["failed"]] == []
    (tmp_path / "again").mkdir()
    again = campaign.campaign(7, 60, tmp_path / "again", 5)
    assert [outcome["case"] for outcome in again] == [outcome["case"] for outcome in outcomes[:5]]


@pytest.mark.slow
def test_a_run_that_is_killed_loses_nothing():
    assert runs.attempt("killed run", random.Random(1)) == []
