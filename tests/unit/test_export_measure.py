"""Divergence and perplexity in closed form, and the windows they are measured on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mule.export.measure import LogitFigures, windows


def test_equal_logits_have_no_divergence() -> None:
    logits = np.random.default_rng(0).standard_normal((45, 11)).astype(np.float32)
    figures = LogitFigures()
    figures.add(list(range(11)) * 4 + [1], logits, logits + 3)  # a shift changes nothing
    assert abs(figures.kl_mean) < 1e-12 and abs(figures.kl_p99) < 1e-12
    assert figures.top1 == 1
    assert figures.max_abs_logit == pytest.approx(3)
    assert figures.ppl == pytest.approx(figures.ppl_reference)


def test_closed_form_over_two_windows() -> None:
    p, q = np.log([[0.5, 0.5]] * 3), np.log([[0.9, 0.1]] * 3)
    figures = LogitFigures()
    figures.add([0, 0, 1], p, p)
    figures.add([0, 0, 1], p, q)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert figures.kl_mean == pytest.approx(kl / 2)
    assert figures.kl_first_mean == pytest.approx(kl / 2)
    assert figures.ppl_reference == pytest.approx(2)
    assert figures.ppl == pytest.approx(math.exp(-(2 * math.log(0.5) + math.log(0.09)) / 4))
    assert figures.num_tokens == 6 and figures.num_predicted == 4


def test_p99_is_of_positions_and_top1_of_the_best() -> None:
    p = np.zeros((1000, 2), np.float32)
    q = p.copy()
    p[:, 0], q[:, 0] = 1, 1
    q[:20, 1] = 3  # 2% of the positions prefer another token
    figures = LogitFigures()
    figures.add([0] * 1000, p, q)
    assert figures.top1 == 0.98
    assert figures.kl_p99 > 0.4 > figures.kl_mean > 0


def test_nan_is_not_hidden() -> None:
    p, q = np.zeros((4, 3)), np.full((4, 3), np.nan)
    figures = LogitFigures()
    figures.add([0, 1, 2, 0], p, q)
    assert math.isnan(figures.kl_mean) and math.isnan(figures.ppl)
    assert math.isnan(figures.max_abs_logit)


def test_windows_take_texts_by_turns_within_the_budget() -> None:
    texts = [list(range(10)), list(range(100, 103)), [7]]
    assert windows(texts, [], 4, 100) == [[0, 1, 2, 3], [100, 101, 102], [4, 5, 6, 7], [8, 9]]
    assert windows(texts, [], 4, 6) == [[0, 1, 2, 3], [100, 101]]
    assert windows(texts, [99], 4, 9) == [[99, 0, 1, 2], [99, 100, 101, 102], [99, 7], [99, 3, 4]]
    assert windows([], [], 4, 9) == []
