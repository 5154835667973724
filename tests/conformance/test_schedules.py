"""Learning rate and batch size at the corner points of the run (report §4.2, §4.3, §5.1)."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.optim import BatchRamp, LRSchedule, Steps

T = 10**12
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def report():
    """The schedule as conf/optim/adamw.yaml ships it."""
    return instantiate(OmegaConf.load(CONF / "optim" / "adamw.yaml")).schedule


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (500, 0.55e-4), (1000, 1.1e-4), (2000, 2.2e-4), (2001, 2.2e-4)])
def test_sec_4_2_warm_up_is_linear_over_2000_steps(report, step, rate):
    assert report.lr(step, step * 3072 * 4096) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (1 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 43 * T // 20, (2.2e-4 + 2.2e-5) / 2),  # half-way down the cosine
        (143 * T // 10, 2.2e-5),
        (143 * T // 10 + 332 * 10**9, 2.2e-5),
        (143 * T // 10 + 333 * 10**9 - 1, 2.2e-5),
        (143 * T // 10 + 333 * 10**9, 7.3e-6),
        (148 * T // 10, 7.3e-6),
    ],
)
def test_sec_4_2_constant_cosine_and_two_tails_in_tokens(report, tokens, rate):
    assert report.lr(10**6, tokens) == pytest.approx(rate, rel=1e-9)


def test_sec_4_2_cosine_falls_all_the_way(report):
    rates = [report.lr(10**6, 10 * T + i * 43 * 10**9) for i in range(101)]
    assert all(a > b for a, b in pairwise(rates))
    assert rates[25] == pytest.approx(2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + 0.5**0.5) / 2, rel=1e-9)


def test_sec_4_2_phases_add_up_to_the_run():
    phases = yaml.safe_load((CONF / "optim" / "adamw.yaml").read_text())["schedule"]["phases"]
    assert sum(float(phase["length"]) for phase in phases) == 14.8e12


@pytest.mark.parametrize(
    ("tokens", "sequences"), [(0, 3072), (469e9 / 2, 9216), (469e9 - 1, 15359), (469e9, 15360), (14e12, 15360)]
)
def test_sec_4_2_batch_grows_from_3072_to_15360_over_469b_tokens(tokens, sequences):
    assert BatchRamp(3072, 15360, 469e9).sequences(int(tokens)) == sequences


def test_sec_4_2_batch_ramp_never_falls_and_stays_a_multiple():
    ramp = BatchRamp(3072, 15360, 469e9, multiple=512)
    sizes = [ramp.sequences(int(t * 1e9)) for t in range(480)]
    assert sizes == sorted(sizes) and all(size % 512 == 0 for size in sizes)
    assert (sizes[0], sizes[-1]) == (3072, 15360)


def test_sec_4_3_context_extension_keeps_the_last_rate():
    constant = LRSchedule(7.3e-6)
    assert {constant.lr(step, step * 62_914_560) for step in range(0, 1000, 100)} == {7.3e-6}


def test_sec_5_1_sft_is_a_cosine_from_5e_6_to_1e_6():
    schedule = LRSchedule(5e-6, [{"shape": "cosine", "length": 1.0, "to": 1e-6}], unit="steps", horizon=400)
    corners = [schedule.lr(step, 0) for step in (0, 200, 400, 500)]
    assert corners == pytest.approx([5e-6, 3e-6, 1e-6, 1e-6], rel=1e-9)


def test_warm_up_multiplies_the_phase_it_lies_in():
    schedule = LRSchedule(1.0, [{"shape": "linear", "length": 100, "to": 0.0}], warmup_steps=10, unit="steps")
    assert schedule.lr(5, 0) == pytest.approx(0.5 * 0.95)
    assert schedule.lr(50, 0) == pytest.approx(0.5)


def test_horizon_stretches_the_phases():
    phases = [{"shape": "constant", "length": 0.8}, {"shape": "linear", "length": 0.2, "to": 0.0}]
    short, long = (LRSchedule(1.0, phases, unit="steps", horizon=n) for n in (100, 1000))
    assert [short.lr(s, 0) for s in (79, 90, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert [long.lr(s, 0) for s in (790, 900, 1000)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(unit="epochs"), "schedule.unit is 'epochs'"),
        (dict(warmup_steps=-1), "warmup_steps is -1"),
        (dict(horizon=0), "horizon is 0"),
        (dict(phases=[{"shape": "step", "length": 1}]), r"phases\[0\].shape is 'step'"),
        (dict(phases=[{"shape": "cosine", "length": 1}]), r"phases\[0\].to is missing"),
        (dict(phases=[{"shape": "constant"}, {"length": 1}]), r"phases\[0\].length is missing"),
        (dict(phases=[{"length": 0}]), r"phases\[0\].length is 0"),
        (dict(phases=[{"tokens": 5}]), r"phases\[0\] has the key 'tokens'"),
    ],
)
def test_bad_schedules_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        LRSchedule(1e-3, **arguments)


def test_bad_ramps_and_steps_are_named():
    with pytest.raises(ValueError, match=r"batch.start is 5, it must be a multiple of batch.multiple, 2"):
        BatchRamp(5, 8, 100, multiple=2)
    with pytest.raises(ValueError, match=r"batch.end is 4"):
        BatchRamp(8, 4, 100)
    with pytest.raises(ValueError, match="2 values need 1 boundaries, found 0"):
        Steps([0.3, 0.1])
    with pytest.raises(ValueError, match="boundaries must rise"):
        Steps([1, 2, 3], [5, 4])
