"""Scores in words: the sentences of the demo's report, and names that nobody has thought of."""

import pytest

from relay_jax.evaluation.words import meaning, number, rows, sentences

DEMO = {
    "FD-random-conv": 0.06693,
    "precision-random-conv": 0.8555,
    "recall-random-conv": 0.6997,
    "FD-random-conv_real": 0.05834,
    "precision-random-conv_real": 0.8477,
    "recall-random-conv_real": 0.8381,
    "class_accuracy": 0.9531,
    "class_accuracy_upsampled": 0.4219,
    "class_accuracy_real": 0.999,
}


def test_the_demos_scores_are_three_sentences() -> None:
    assert sentences(DEMO) == [
        "95% of the samples show the class that was asked for, says a classifier (99.9% of "
        "real images, 42% of the first stage's images, enlarged).",
        "FD-random-conv is 0.0669, and 0.0583 for as many real images: lower is better; it is not "
        "FID.",
        "86% of the samples lie among real images (precision), 70% of the real images among "
        "samples (recall); of as many real images 85% and 84%.",
    ]


def test_published_scores_have_no_counterparts() -> None:
    scores = {"FID": 1.87, "sFID": 3.97, "IS": 278.75, "precision": 0.81, "recall": 0.59}
    assert sentences(scores) == [
        "FID is 1.87: lower is better.",
        "81% of the samples lie among real images (precision), 59% of the real images among "
        "samples (recall).",
    ]
    assert sentences({}) == [] and rows({}) == []


def test_every_score_is_one_row_with_its_counterparts() -> None:
    table = {row.name: row for row in rows(DEMO | {"KID-mine": 0.00123, "own-mine": 3.0})}
    assert list(table) == [
        "FD-random-conv",
        "precision-random-conv",
        "recall-random-conv",
        "class_accuracy",
        "KID-mine",
        "own-mine",
    ]
    accuracy = table["class_accuracy"]
    assert (accuracy.value, accuracy.real, accuracy.upsampled) == ("95%", "99.9%", "42%")
    assert table["KID-mine"][1:4] == ("0.00123", "", "")
    assert "random-conv" in table["FD-random-conv"].meaning
    assert "fidelity" in table["precision-random-conv"].meaning and meaning("own-mine") == ""
    assert meaning("KID-mine").endswith("for chance) in mine features; lower is better")
    assert meaning("FD-mine_ratio") == "as a multiple of that of as many real images; 1 is ideal"


@pytest.mark.parametrize(
    "name, value, text",
    [("FID", 12.3456, "12.3"), ("precision", 1.0, "100.0%"), ("recall-x", 0.0, "0%")],
)
def test_shares_are_in_per_cent(name: str, value: float, text: str) -> None:
    assert number(name, value) == text
