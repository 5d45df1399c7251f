"""Rates, KL warm-up, early stopping, number of epochs."""

import pytest
import torch

from atlasvi.errors import OptionError
from atlasvi.train.schedule import (
    PLANS,
    EarlyStopping,
    TrainingPlan,
    adapted,
    default_epochs,
    steps_between_checks,
)


def test_the_kl_weight_rises_by_epochs_from_its_least_to_its_most():
    plan = TrainingPlan(n_epochs_kl_warmup=4, min_kl_weight=0.2, max_kl_weight=1.0)
    weights = [plan.kl_weight(epoch, step=1000) for epoch in range(6)]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_kl_weight_rises_by_steps_where_no_epochs_are_given():
    plan = TrainingPlan(n_epochs_kl_warmup=None, n_steps_kl_warmup=10)
    assert [plan.kl_weight(0, step) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])


def test_epochs_of_warm_up_win_over_steps_as_in_scvi_tools():
    plan = TrainingPlan(n_epochs_kl_warmup=2, n_steps_kl_warmup=10)
    assert plan.kl_weight(1, step=0) == pytest.approx(0.5)


def test_without_warm_up_the_kl_weight_is_full_at_once():
    assert TrainingPlan(n_epochs_kl_warmup=None).kl_weight(0, 0) == 1.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "SGD"}, "SGD"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"min_kl_weight": 2.0}, "min_kl_weight"),
        ({"min_kl_weight": -2.0}, "min_kl_weight"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": "0.1"}, "lr"),
        ({"lr": None}, "lr"),
        ({"eps": -1}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"lr_factor": 2}, "lr_factor"),
        ({"batch_norm_momentum": 5}, "batch_norm_momentum"),
        ({"averaging": 1.0}, "averaging"),
        ({"n_steps_kl_warmup": -5}, "n_steps_kl_warmup"),
        ({"n_steps_per_check": 0}, "n_steps_per_check"),
        ({"lr_scheduler_metric": "elbo_train"}, "elbo_train"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, named):
    with pytest.raises(OptionError, match=named):
        TrainingPlan(**options)


def test_an_unknown_option_of_the_plan_is_refused_with_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'weight_decay'"):
        TrainingPlan().with_options({"weigth_decay": 0.1})


def test_options_change_a_copy_of_the_plan():
    plan = TrainingPlan()
    assert plan.with_options({"lr": 0.5}).lr == 0.5
    assert plan.lr == 1e-3
    assert plan.with_options(None) == plan


def test_the_rate_falls_when_the_metric_stalls_and_not_below_its_least():
    plan = TrainingPlan(reduce_lr_on_plateau=True, lr=1.0, lr_factor=0.1, lr_patience=1, lr_min=0.05)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.lr)
    scheduler = plan.make_scheduler(optimizer)
    rates = []
    for value in [5.0, 4.0, 4.0, 4.0, 4.0, 4.0]:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.1, 0.1, 0.05])


def test_the_optimisers_take_their_options():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    for name, kind in (("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)):
        made = TrainingPlan(optimizer=name, lr=0.5, eps=0.25, weight_decay=0.125).make_optimizer(weight)
        assert type(made) is kind
        group = made.param_groups[0]
        assert (group["lr"], group["eps"], group["weight_decay"]) == (0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([], False),
        ([3.0, 2.0, 1.0], False),
        ([1.0, 2.0], False),  # one epoch without gain
        ([1.0, 2.0, 2.0], True),  # two
        ([1.0, 2.0, 0.5], False),
        ([1.0, 0.95, 0.9], True),  # gains below min_delta
        ([float("nan"), float("nan")], True),
    ],
)
def test_early_stopping_counts_epochs_without_gain(values, stops):
    assert EarlyStopping(patience=2, min_delta=0.2).says_stop(values) is stops


@pytest.mark.parametrize(("n_obs", "epochs"), [(10, 400), (20_000, 400), (40_000, 200), (10**8, 1)])
def test_the_number_of_epochs_is_scvi_tools_rule(n_obs, epochs):
    assert default_epochs(n_obs) == epochs


@pytest.mark.parametrize(("n_obs", "steps"), [(1_000, 200), (12_800, 400), (10**6, 1_000)])
def test_the_adaptive_warm_up_is_of_four_epochs_within_bounds(n_obs, steps):
    plan = adapted(PLANS["adaptive"], n_obs, batch_size=128)
    assert plan.n_steps_kl_warmup == steps
    assert plan.kl_weight(0, steps // 2) == pytest.approx(0.5)


@pytest.mark.parametrize("given", [{"n_steps_kl_warmup": 7}, {"n_epochs_kl_warmup": 7}])
def test_a_warm_up_that_was_asked_for_stays(given):
    plan = PLANS["adaptive"].with_options(given)
    assert adapted(plan, 1_000, 128) is plan
    assert adapted(PLANS["scvi-tools"], 1_000, 128) is PLANS["scvi-tools"]


def test_looks_are_rarer_where_more_cells_are_looked_at():
    plan = TrainingPlan(n_steps_per_check=25)
    assert steps_between_checks(plan, 100, 128) == 25
    assert steps_between_checks(plan, 4_096, 128) == 128
    assert steps_between_checks(plan, 0, 128) is None
    assert steps_between_checks(TrainingPlan(), 100, 128) is None


def test_the_rate_rises_to_its_value():
    plan = TrainingPlan(lr=0.4, n_steps_lr_warmup=4)
    assert [plan.lr_at(step) for step in (0, 1, 3, 9)] == pytest.approx([0.1, 0.2, 0.4, 0.4])


def test_patience_in_steps_counts_steps():
    stopping = EarlyStopping(patience=50, in_steps=True)
    assert not stopping.says_stop([2.0, 3.0], [25, 74])
    assert stopping.says_stop([2.0, 3.0], [25, 75])


def test_patience_is_twice_the_length_of_the_average_at_least():
    """At step 890 it is over the last 100 steps; at 3,000 over 50, its most."""
    stopping = EarlyStopping(patience=50, in_steps=True, averaging=0.98)
    for last, stops in ((889, False), (890, True)):
        stopping_late = EarlyStopping(patience=50, in_steps=True, averaging=0.999)
        assert stopping_late.says_stop([2.0, 3.0], [690, last]) is stops
    assert not stopping.says_stop([2.0, 3.0], [2_900, 2_999])
    assert stopping.says_stop([2.0, 3.0], [2_900, 3_000])
    assert EarlyStopping(patience=2, averaging=0.999).says_stop([1.0, 2.0, 2.0])  # epochs are counted as ever
