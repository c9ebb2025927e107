"""The standings: who is compared with whom, what is said of it, and what a table's CSV holds."""

from __future__ import annotations

import csv
import io

import pytest

from bitwright.standings import COLUMNS, Contender, csv_text, sentences, standings
from contenders import contender


def test_a_planted_difference_is_found_and_said() -> None:
    table = standings([contender("uniform", [0.8] * 3, 0.8), contender("good", [0.9] * 3, 0.9), contender("same", [0.8] * 3, 0.7)], {})
    assert table["leader"] == "good"
    assert [entry["label"] for entry in table["methods"]] == ["good", "uniform", "same"]
    assert [(c["a"], c["b"], c["significant"]) for c in table["comparisons"]] == [
        ("good", "uniform", True),
        ("same", "uniform", False),
        ("good", "same", True),
    ]
    first, second, third = table["sentences"]
    assert first.startswith("Mixed widths beat uniform here: good (+9.87 points, +")
    assert first.endswith("p < 0.001).")
    assert second.startswith("Not significantly different from uniform: same (")
    assert third.startswith("Best on the selection images is good; significantly worse than it: same (-9.93).")


def test_a_method_that_loses_to_uniform_is_said_to_lose() -> None:
    table = standings([contender("uniform", [0.9] * 3, 0.9), contender("bad", [0.8] * 3, 0.95)], {})
    assert table["methods"][0]["label"] == "bad"
    text = " ".join(table["sentences"])
    assert "Mixed widths do not beat uniform here: no method is significantly ahead of it" in text
    assert "Significantly worse than uniform: bad (-9.77 points, " in text


def test_the_leader_is_chosen_without_the_test_images() -> None:
    table = standings([contender("lucky", [0.95] * 3, 0.8), contender("uniform", [0.8] * 3, 0.85), contender("sound", [0.9] * 3, 0.9)], {})
    assert table["leader"] == "sound"
    assert "Best on the selection images is sound; significantly better than it: lucky (+4.93)." in table["sentences"][-1]


def test_the_same_policies_are_the_same_and_no_comparison() -> None:
    uniform = contender("uniform", [0.8] * 3, 0.8)
    twin = Contender("twin", contender("twin", [0.8] * 3, 0.8, key="uniform").rows, uniform.correct)
    table = standings([uniform, twin], {})
    assert table["comparisons"] == []
    assert table["methods"][1]["same_as"] == "uniform"
    assert "The very policy of uniform was found by twin." in table["sentences"]
    assert [row["same_as"] for row in table["methods"][1]["rows"]] == ["uniform"] * 3


def test_without_uniform_or_without_anybody() -> None:
    table = standings([contender("a", [0.8] * 3, 0.8), contender("b", [0.8] * 3, 0.7)], {"uniform": "seed 0: no single width keeps it"})
    assert table["sentences"][0] == "There is no uniform policy to beat here (seed 0: no single width keeps it)."
    assert [(c["a"], c["b"]) for c in table["comparisons"]] == [("a", "b")]
    assert standings([], {"a": "no"})["sentences"] == ["No method could run; the reasons are beside their names."]


@pytest.mark.parametrize(
    ("seeds", "said"), [(1, "One seed: the intervals cover other test images"), (2, "Two seeds tell little of a third")]
)
def test_few_seeds_are_said_to_be_few(seeds: int, said: str) -> None:
    table = standings([contender("uniform", [0.8] * seeds, 0.8), contender("b", [0.8] * seeds, 0.7)], {})
    assert said in table["sentences"][-1]
    assert not any("seeds tell" in text for text in standings([contender("uniform", [0.8] * 3, 0.8)], {})["sentences"])


def test_a_search_that_was_stopped_is_named() -> None:
    one = contender("uniform", [0.8] * 3, 0.8)
    one.rows[1]["search"]["status"] = "stopped"
    assert standings([one], {})["sentences"][-1] == "Stopped by a step or time limit before it was done: uniform."


def test_a_uniform_that_leaves_much_unspent_is_said_to() -> None:
    one = contender("uniform", [0.8] * 3, 0.8)
    assert not any("spends" in text for text in standings([one], {})["sentences"])
    one.rows[0]["search"]["costs"] = [55]
    assert standings([one], {})["sentences"][-1].startswith("Uniform, W2A4 in most sites, spends 55% of the budget: no wider one fits.")


def test_uniform_may_lead() -> None:
    methods = [contender("uniform", [0.9] * 3, 0.9), contender("a", [0.9] * 3, 0.8), contender("b", [0.9] * 3, 0.8)]
    assert standings(methods, {})["sentences"][-1] == "Best on the selection images is uniform itself."


def test_an_accuracy_never_leaves_its_range() -> None:
    (entry,) = standings([contender("uniform", [0.99, 1.0], 0.8, n=200)], {})["methods"]
    assert entry["accuracy"]["interval"][1] == 1.0


def test_the_csv_has_a_row_a_seed_and_one_of_the_mean() -> None:
    table = standings([contender("uniform", [0.8] * 3, 0.8), contender("good", [0.9] * 3, 0.9)], {"other": "seed 0: needs x"})
    table |= {"budget": "weight_bits<=2", "stage": "long", "finetune": {"epochs": 2}}
    rows = list(csv.DictReader(io.StringIO(csv_text([table]))))
    assert list(rows[0])[:4] == ["method", "budget", "seed", "stage"]
    assert list(rows[0]) == [*COLUMNS, "commit"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        *[("good", seed) for seed in ("0", "1", "2", "mean")],
        *[("uniform", seed) for seed in ("0", "1", "2", "mean")],
        ("other", "mean"),
    ]
    mean = rows[3]
    assert float(mean["average_weight_bits"]) == 3.0
    assert float(mean["top1"]) == pytest.approx(sum(float(row["top1"]) for row in rows[:3]) / 3)
    assert float(mean["difference"]) == pytest.approx(float(mean["top1"]) - float(rows[7]["top1"]))
    assert float(mean["p_value"]) < 0.05
    assert rows[7]["difference"] == ""
    assert (rows[0]["search_sample_passes"], rows[0]["weight_widths"], rows[0]["commit"]) == ("50", "2:3", "abc")
    assert rows[8]["left_out"] == "seed 0: needs x"


def test_sentences_are_made_from_the_table_alone() -> None:
    table = standings([contender("uniform", [0.8] * 3, 0.8), contender("good", [0.9] * 3, 0.9)], {})
    assert sentences(table) == table["sentences"]
