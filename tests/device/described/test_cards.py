"""Cards that are described: where each figure is from, and what is assumed."""

from __future__ import annotations

import pytest

from tightfit.device.described.cards import card_for, card_named, cards
from tightfit.errors import UnsupportedInput


def test_every_figure_has_a_source_or_is_assumed() -> None:
    for card in cards().values():
        for name, figure in card.figures.items():
            assert bool(figure.source) is not bool(figure.assumed), f"{card.name}: {name}"
            assert figure.value > 0, f"{card.name}: {name}"


def test_what_is_assumed_is_no_better_than_what_is_known() -> None:
    known = {name: [c[name] for c in cards().values() if c.figures[name].source] for name in ("fp32_tflops",)}
    shares = [c["capacity_bytes"] / (c["memory_gib"] * 2**30) for c in cards().values()]
    any_other = card_for("cuda:24GiB")
    assert any_other["fp32_tflops"] <= min(known["fp32_tflops"])
    assert any_other["bandwidth_gb_s"] <= min(card["bandwidth_gb_s"] for card in cards().values())
    assert min(shares) == pytest.approx(0.91, abs=1e-3)


def test_no_card_offers_more_than_it_is_sold_with() -> None:
    for card in cards().values():
        assert card.context_bytes < card.capacity_bytes <= card["memory_gib"] * 2**30


def test_a_card_is_named_by_the_list_or_by_its_size() -> None:
    assert card_for("RTX4090-24gb").title == "NVIDIA GeForce RTX 4090"
    assert card_for("cuda:24GiB").capacity_bytes == 24 * 2**30
    assert card_named("cuda:1") is None
    assert card_named("cpu") is None


@pytest.mark.parametrize("text", ["rtx9999", "cuda:1", "cuda:100MiB"])
def test_what_names_no_card_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedInput, match=r"tightfit devices|context alone"):
        card_for(text)
