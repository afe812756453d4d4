import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from yapo_peft import ConfigError, DatasetError, Scores
from yapo_peft.evaluation import (
    at_matched_damage,
    cultural_scores,
    normalised_localization_gap,
    plot_dose_response,
    plot_losses,
    plot_matched_damage,
    robust_cultural_accuracy,
)


def scores(values, metric="margin", **labels):
    """Scores of one metric from `{multiplier: [value per example]}`."""
    rows = [
        {"multiplier": multiplier, "example": index, metric: float(value)}
        for multiplier, column in values.items()
        for index, value in enumerate(column)
    ]
    return Scores(pd.DataFrame(rows), (metric,)).labelled(**labels)


NOISE = np.random.default_rng(0).normal(2.0, 3.0, 60)


def test_summary_has_means_and_intervals():
    summary = scores({0.0: NOISE, 1.0: [5.0] * 60}).summary(resamples=9999)
    expected = bootstrap((NOISE,), np.mean, method="percentile", rng=1).confidence_interval
    row = summary.iloc[0]
    assert (row["multiplier"], row["examples"]) == (0.0, 60)
    assert row["margin"] == pytest.approx(NOISE.mean())
    assert (row["margin_low"], row["margin_high"]) == pytest.approx(tuple(expected), abs=0.05)
    assert summary.iloc[1][["margin", "margin_low", "margin_high"]].tolist() == [5.0, 5.0, 5.0]


def test_seeds_are_averaged_and_widen_the_interval():
    parts = [scores({1.0: NOISE + shift}, seed=seed) for seed, shift in enumerate((-2.0, 0.0, 2.0))]
    one, all_ = parts[1].summary(), Scores.concat(parts).summary()
    assert len(all_) == 1
    assert all_["margin"].item() == pytest.approx(NOISE.mean())
    width = [float((table["margin_high"] - table["margin_low"]).iloc[0]) for table in (one, all_)]
    assert width[1] > 1.3 * width[0]


def test_summary_groups_by_label_and_ignores_nan():
    known = [*NOISE[:-1], float("nan")]
    both = Scores.concat([scores({1.0: known}, method="a"), scores({1.0: NOISE}, method="b")])
    summary = both.summary()
    assert summary["method"].tolist() == ["a", "b"]
    assert summary["margin"].tolist() == pytest.approx([NOISE[:-1].mean(), NOISE.mean()])
    unknown = scores({1.0: [float("nan")] * 3}).summary()
    assert unknown[["margin", "margin_low", "margin_high"]].isna().all(axis=None)


def test_scores_roundtrip_through_a_file(tmp_path):
    saved = scores({0.0: [1 / 3, float("nan")]}, method="a", seed=0)
    loaded = Scores.load(saved.save(tmp_path / "new" / "scores.json"))
    pd.testing.assert_frame_equal(loaded.table, saved.table)
    assert loaded.metrics == saved.metrics
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["scores.json"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"other.json' is not a file of scores"):
        Scores.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: scores({0.0: [1]}).labelled(margin=1), "'margin' is already a column"),
        (lambda: Scores.concat([]), "no scores"),
        (lambda: Scores.concat([scores({0.0: [1]}), scores({0.0: [1]}, "kl")]), "cannot be concatenated"),
        (lambda: Scores.concat([scores({0.0: [1]}), scores({0.0: [1]}, method="a")]), "cannot be concatenated"),
        (lambda: scores({0.0: [1]}).summary(confidence=95), "confidence=95"),
        (
            lambda: plot_dose_response(scores({0.0: [1]}), "x.png", "x"),
            r"multipliers=\[0.0\]: a dose-response needs at least two",
        ),
        (
            lambda: plot_dose_response(scores({0.0: [1], 1.0: [1]}), "dose", "x"),
            "path='dose': the extension must be one of",
        ),
        (lambda: plot_dose_response(scores({0.0: [1]}), "x.png", "x", metrics=["kl"]), r"metrics=\['kl'\]"),
        (lambda: plot_losses({"a": [{"step": 1}]}, "x.png", "x"), "'a' did not log 'loss'; it logged step"),
        (lambda: cultural_scores(scores({0.0: [1]})), "RCA and PNLG need 'accuracy'"),
        (lambda: at_matched_damage(scores({0.0: [1]}), scores({0.0: [1]}), [1], metric="kl"), "no metric 'kl'"),
    ],
)
def test_invalid_arguments_raise(do, message):
    with pytest.raises(ConfigError, match=message):
        do()


def test_quadratic_damage_is_matched_exactly_between_multipliers():
    effect = [
        scores({m: [slope * m] * 3 for m in (-1.0, 0.0, 1.0, 2.0)}, method=name)
        for name, slope in (("a", 1.0), ("b", 2.2))
    ]
    damage = [
        scores({m: [rate * m * m] * 3 for m in (-1.0, 0.0, 1.0, 2.0)}, "kl", method=name)
        for name, rate in (("a", 0.1), ("b", 0.2))
    ]
    table = at_matched_damage(Scores.concat(effect), Scores.concat(damage), [0.05, 0.1, 0.3], metric="margin")
    assert table["method"].tolist() == ["a"] * 3 + ["b"] * 3
    assert table["multiplier"].tolist() == pytest.approx([0.5**0.5, 1.0, 3**0.5, 0.5, 0.5**0.5, 1.5**0.5])
    assert table["margin"].tolist() == pytest.approx([0.5**0.5, 1.0, 3**0.5, 1.1, 2.2 * 0.5**0.5, 2.2 * 1.5**0.5])
    down = at_matched_damage(Scores.concat(effect), Scores.concat(damage), [0.05], metric="margin", negative=True)
    assert down["margin"].tolist() == pytest.approx([-(0.5**0.5), -1.1])


def test_first_multiplier_with_the_damage_is_used_and_nan_is_ignored():
    effect = scores({m: [m] for m in (0.0, 1.0, 2.0, 3.0, 4.0)})
    damage = scores({0.0: [0.0], 1.0: [0.1], 2.0: [0.05], 3.0: [0.2], 4.0: [float("nan")]}, "kl")
    table = at_matched_damage(effect, damage, [0.05, 0.1, 0.15, 0.3], metric="margin")
    assert table["multiplier"].tolist() == pytest.approx([0.5**0.5, 1.0, 1 + 3**0.5, math.nan], nan_ok=True)


def test_damage_with_an_unsteered_baseline_is_interpolated_linearly():
    effect, nll = scores({0.0: [0], 1.0: [2]}), scores({0.0: [3.0], 1.0: [4.0]}, "nll")
    table = at_matched_damage(effect, nll, [3.25], metric="margin", damage_metric="nll")
    assert table["margin"].tolist() == [0.5]


def test_unknown_effect_is_nan():
    effect, damage = scores({0: [math.nan], 1: [math.nan]}), scores({0: [0], 1: [0.5]}, "kl")
    assert math.isnan(at_matched_damage(effect, damage, [0.25], metric="margin")["margin"][0])
    with pytest.raises(ConfigError, match="kl is nowhere negative"):
        at_matched_damage(effect, damage, [-0.25], metric="margin")


def test_difference_from_a_reference_is_of_paired_examples():
    # "b" does four times the damage of "a": at half the multiplier, it moves each example by 0.5 more.
    slopes, rates = {"a": NOISE, "b": 2 * NOISE + 1}, {"a": 0.1, "b": 0.4}
    multipliers = (0.0, 1.0, 2.0)
    effect = Scores.concat([scores({m: m * slopes[name] for m in multipliers}, method=name) for name in "ab"])
    damage = Scores.concat(
        [scores({m: [rates[name] * m * m] for m in multipliers}, "kl", method=name) for name in "ab"]
    )
    table = at_matched_damage(effect, damage, [0.1, 0.4, 1], metric="margin", reference={"method": "a"})
    differences = table[["difference", "difference_low", "difference_high"]].to_numpy().tolist()
    assert differences[:2] == [[0.0] * 3] * 2
    assert differences[3:5] == [pytest.approx([0.5] * 3), pytest.approx([1.0] * 3)]
    assert table["margin_high"][3] - table["margin_low"][3] > 1
    # "a" does not reach the last level.
    assert math.isnan(table["difference"][5])
    assert not math.isnan(table["margin"][5])
    plain = at_matched_damage(effect, damage, [0.1, 0.4, 1], metric="margin")
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    for reference in ({}, {"seed": 0}, {"method": "c"}):
        with pytest.raises(ConfigError, match="reference="):
            at_matched_damage(effect, damage, [0.1], metric="margin", reference=reference)


def test_a_reference_without_seeds_is_compared_with_all():
    slopes = {("caa", 0): 1, ("yapo", 0): 2, ("yapo", 1): 4}
    effect = [scores({0.0: [0, 0], 1.0: [s, 3 * s]}, method=name, seed=seed) for (name, seed), s in slopes.items()]
    damage = [scores({0.0: [0], 1.0: [0.1]}, "kl", method=name, seed=seed) for name, seed in slopes]
    options = {"metric": "margin", "reference": {"method": "caa"}}
    table = at_matched_damage(Scores.concat(effect), Scores.concat(damage), [0.1, 0.1], **options)
    assert table["margin"].tolist() == [2.0, 6.0]
    assert table["difference"].tolist() == [0.0, 4.0]


def test_methods_without_a_label_and_infinite_damage_are_matched():
    effect = Scores.concat([scores({0: [0, 0], 1: [2, 3], 2: [4, 5]}, method=name) for name in ("a", None)])
    harm = {0: [0, 0], 1: [math.inf, 0.5], 2: [2, 2]}
    damage = Scores.concat([scores(harm, "kl", method=name) for name in ("a", None)])
    table = at_matched_damage(effect, damage, [0.125], metric="margin", reference={"method": None})
    assert table["multiplier"].tolist() == [0.5, 0.5]
    assert table["difference"].tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match=r"levels=\[\]: give at least one"):
        at_matched_damage(effect, damage, [], metric="margin")


def test_plot_at_equal_damage_has_a_line_per_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("yapo_peft.evaluation.plots._save", lambda figure, path: drawn.append(figure))
    effect = Scores.concat([scores({0.0: NOISE, 1.0: NOISE + 1}, method=name) for name in "ab"])
    damage = Scores.concat([scores({0.0: [0], 1.0: [0.4]}, "kl", method=name) for name in "ab"])
    for reference, metric in ((None, "margin"), ({"method": "a"}, "margin"), ({"method": "a"}, "difference")):
        table = at_matched_damage(effect, damage, [0.1, 0.2, 0.3], metric="margin", reference=reference)
        plot_matched_damage(table, tmp_path / "x.png", "x", metric=metric)
        lines = {line.get_label(): len(line.get_xdata()) for line in drawn.pop().axes[0].lines}
        assert lines == {"a": 3, "b": 3}


def test_unlabelled_scores_are_matched():
    table = at_matched_damage(scores({0: [0], 1: [2]}), scores({0: [0], 1: [0.5]}, "kl"), [0.25], metric="margin")
    assert table["margin"].tolist() == pytest.approx([2**0.5])


def test_effect_without_matching_damage_raises():
    effect, damage = scores({0: [0], 1: [2]}, method="a"), scores({0: [0], 1: [2]}, "kl", method="b")
    with pytest.raises(ConfigError, match=r"{'method': 'a'}: effect and damage have 0 multipliers"):
        at_matched_damage(effect, damage, [0.1], metric="margin")
    with pytest.raises(ConfigError, match="have 1 multipliers <= 0 in common"):
        at_matched_damage(effect, damage.labelled(method="a"), [0.1], metric="margin", negative=True)


@pytest.mark.parametrize(
    ("localized", "nonlocalized", "rca", "pnlg"),
    [
        (0.8, 0.4, 8 / 15, 2 / 3),
        (0.5, 0.5, 0.5, 0.0),
        (0.4, 0.8, 8 / 15, -2 / 3),
        (0.5, 0.0, 0.0, 2.0),
        (0, 0, 0.0, math.nan),
    ],
)
def test_cultural_metrics(localized, nonlocalized, rca, pnlg):
    assert robust_cultural_accuracy(localized, nonlocalized) == pytest.approx(rca)
    assert normalised_localization_gap(localized, nonlocalized) == pytest.approx(pnlg, nan_ok=True)


def test_cultural_scores_have_a_row_per_country_and_multiplier():
    parts = [
        scores({0.0: right, 1.0: [1, 1, 1, 1]}, "accuracy", country=country, localization_status=status)
        for country, status, right in (("UK", "localized", [1, 1, 1, 0]), ("UK", "nonlocalized", [1, 0, 0, 0]))
    ]
    table = cultural_scores(Scores.concat(parts))
    found = table[["country", "multiplier", "localized", "nonlocalized", "rca", "pnlg"]]
    assert found.iloc[0].tolist() == ["UK", 0.0, 0.75, 0.25, pytest.approx(0.375), pytest.approx(1.0)]
    assert 0 <= table["rca_low"][0] < 0.375 < table["rca_high"][0] <= 1
    assert -2 <= table["pnlg_low"][0] < 1 < table["pnlg_high"][0] <= 2
    assert table["rca"][1] == 1.0
    with pytest.raises(ConfigError, match=r"lacks \['nonlocalized'\]"):
        cultural_scores(parts[0])


def test_cultural_intervals_match_resampling_of_questions():
    draw = np.random.default_rng(0)
    # Questions are paired: most that are right without the country's name are right with it.
    known = draw.random(200)
    right = {status: known < share for status, share in (("localized", 0.7), ("nonlocalized", 0.5))}
    parts = [scores({1.0: column}, "accuracy", localization_status=status) for status, column in right.items()]
    drawn = [draw.choice(200, 200) for _ in range(4000)]
    table = cultural_scores(Scores.concat(parts), confidence=0.9)
    for name, statistic in (("rca", robust_cultural_accuracy), ("pnlg", normalised_localization_gap)):
        resampled = [statistic(*(column[rows].mean() for column in right.values())) for rows in drawn]
        expected = np.quantile(resampled, [0.05, 0.95])
        assert [table[f"{name}_low"][0], table[f"{name}_high"][0]] == pytest.approx(expected, abs=0.015)


def test_dollars_in_titles_and_names_are_no_mathematics(tmp_path):
    table = [
        {"multiplier": m, "example": 0, "margin": 1.0, "method": name} for m in (0.0, 1.0) for name in ("$a_{$", "b")
    ]
    scores = Scores(pd.DataFrame(table), ["margin"])
    assert plot_dose_response(scores, tmp_path / "doses.svg", "$5_{ to $6").is_file()


def test_plots_are_saved(tmp_path):
    both = Scores.concat([scores({m: NOISE + m for m in (-1.0, 0.0, 1.0)}, method=name) for name in ("a", "b")])
    damage = Scores.concat([scores({m: [abs(m)] for m in (-1.0, 0.0, 1.0)}, "kl", method=name) for name in ("a", "b")])
    table = at_matched_damage(both, damage, [0.1, 0.5], metric="margin", reference={"method": "a"})
    paths = [
        plot_dose_response(both, tmp_path / "new" / "dose.png", "Dose-response"),
        plot_matched_damage(table, tmp_path / "new" / "matched.png", "Matched", metric="margin"),
        plot_losses(
            {"a": [{"step": s, "loss": 1 / s} for s in (1, 2)] + [{"step": 2}]}, tmp_path / "new" / "loss.png", "Loss"
        ),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["dose.png", "loss.png", "matched.png"]


def test_concat_rejects_duplicate_measurements():
    table = pd.DataFrame({"multiplier": [0.0, 1.0], "example": [0, 0], "margin": [1.0, 2.0]})
    scores = Scores(table, ("margin",))
    with pytest.raises(ConfigError, match="measured twice at a multiplier"):
        Scores.concat([scores, scores])
    assert len(Scores.concat([scores.labelled(method="a"), scores.labelled(method="b")]).table) == 4
    assert len(Scores.concat([scores.labelled(seed=0), scores.labelled(seed=1)]).summary()) == 2


@pytest.mark.parametrize("name", ["examples", "margin_low", "margin", "answer"])
def test_label_rejects_names_of_columns(name):
    scores = Scores(pd.DataFrame({"multiplier": [0.0], "example": [0], "margin": [1.0]}), ("margin",))
    with pytest.raises(ConfigError, match=f"'{name}' is already a column"):
        scores.labelled(**{name: 1})


def test_gains_are_paired_with_each_example_at_multiplier_0():
    margins = np.random.default_rng(0).normal(scale=100, size=30)
    rows = [
        {"multiplier": m, "example": i, "base": "a", "margin": margin + 2 * m + 0.01 * m * i}
        for m in (0.0, 1.0) for i, margin in enumerate(margins)
    ]  # fmt: skip
    gains = Scores(pd.DataFrame(rows), ("margin",)).gains("margin").summary().set_index("multiplier").loc[1.0]
    assert gains["gain"] == pytest.approx(2 + 0.01 * 14.5)
    assert gains["gain_high"] - gains["gain_low"] < 0.1
    with pytest.raises(ConfigError, match="measured from multiplier 0: measure all examples at it"):
        Scores(pd.DataFrame(rows[1:]), ("margin",)).gains("margin")
    with pytest.raises(ConfigError, match="There is no metric 'kl'; the scores have 'margin'"):
        Scores(pd.DataFrame(rows), ("margin",)).gains("kl")
