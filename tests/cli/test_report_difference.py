"""The relative difference of two arms' losses, and what chance alone makes of it."""

import numpy as np
import pytest

from litseek.cli.report_difference import average, differences, draw, sentence
from litseek.errors import LitseekError


def test_a_constant_factor_is_its_percentage():
    base = {seed: np.linspace(5, 3, 50) + seed / 100 for seed in (0, 1)}
    curves = {"bf16": base, "fp8": {seed: values * 1.002 for seed, values in base.items()}, "other": {7: np.ones(50)}}
    fp8, noise = differences(curves, "bf16", 10)
    assert fp8.arm == "fp8" and len(fp8.seeds[0]) == 40 and fp8.largest == pytest.approx(0.2)
    assert noise.arm == "seeds of bf16" and 0 < noise.largest < 0.2
    text = sentence([fp8, noise], "loss", "bf16", 10)
    assert "`fp8` at most 0.200%, at the end +0.200%" in text and "after step 10" in text
    assert len(draw([fp8, noise], "loss", "bf16", 0.25).axes) == 1


def test_the_average_weighs_the_newest_by_a_tenth():
    assert average(np.array([1.0, 2.0, 2.0])) == pytest.approx([1.0, 1.1, 1.19])


def test_what_is_not_there():
    with pytest.raises(LitseekError, match="against=fp32 is no arm with finished runs; there are bf16"):
        differences({"bf16": {0: np.ones(3)}}, "fp32", 0)
    with pytest.raises(LitseekError, match="after=9 must be a step of the runs, which have 3"):
        differences({"bf16": {0: np.ones(3)}}, "bf16", 9)
