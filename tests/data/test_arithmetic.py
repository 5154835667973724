"""Arithmetic problems: worked answers that verify, splits that never meet, fixed held-out problems."""

import itertools

import pytest

from litseek.data.arithmetic import Arithmetic, chain_sum_steps, extract_answer, problem_key, split_of

EASY = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}


def make(split: str = "sft", **keys) -> Arithmetic:
    return Arithmetic(split, options=EASY, **keys)


@pytest.mark.parametrize("spaced_digits", [False, True])
def test_worked_answers_pass_their_verifier(spaced_digits):
    problems = make(spaced_digits=spaced_digits)
    for i in range(200):
        problem = problems[i]
        assert problems.score(problem, problem.solution) == 1.0
        assert problem.prompt.endswith(" =")


def test_steps_follow_the_expression():
    assert chain_sum_steps("3 + 9 - 2 - 15") == ["3 + 9 = 12", "12 - 2 = 10", "10 - 15 = -5"]


SUMS = {**EASY, "operators": ["+"], "allow_parentheses": False, "allow_negation": False}


def test_basic_arithmetic_works_its_sums_and_refuses_what_has_no_steps():
    problems = Arithmetic("sft", task="basic_arithmetic", options=SUMS)
    for i in range(50):
        problem = problems[i]
        assert problem.prompt.endswith(" =") and "-" not in problem.solution
        assert problems.score(problem, problem.solution) == 1.0
    products = Arithmetic("sft", task="basic_arithmetic", options={**SUMS, "operators": ["*"]})
    with pytest.raises(ValueError, match="worked steps exist for sums"):
        products[0]
    direct = Arithmetic("sft", task="basic_arithmetic", options={**SUMS, "operators": ["*"]}, worked=False)
    assert direct.score(direct[0], direct[0].solution) == 1.0


def test_digits_are_spaced_everywhere():
    options = {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}
    problems = Arithmetic("sft", options=options, spaced_digits=True)
    for i in range(20):
        problem = problems[i]
        for text in (problem.prompt, problem.solution):
            assert not any(a.isdigit() and b.isdigit() for a, b in itertools.pairwise(text))


@pytest.mark.parametrize(
    "response",
    ["", "Answer:", "12", "Answer: 9 Answer:", "Answer: 1 2 3", "Answer: 12 or so", "Answer: 1 2", "Answer: 12\nmore"],
)
def test_anything_but_the_answer_scores_zero(response):
    problems = make()
    problem = problems.problem({"answer": "12", "question": "", "metadata": {"expression": "3 + 9"}})
    assert problems.score(problem, response) == 0.0
    assert problems.score(problem, "Answer: 9\nAnswer: 12") == 1.0
    spaced = make(spaced_digits=True)
    assert spaced.score(problem, "Answer: 1 2") == 1.0


def test_extract_answer_takes_the_last_mark():
    assert extract_answer("Answer: 1\nAnswer: - 2 ") == "- 2"
    assert extract_answer("no mark") is None


def test_splits_share_no_problem_whatever_the_seeds():
    held_out = {problem_key(p.entry) for p in make("eval").held_out(500)}
    assert len(held_out) == 500
    seen = {split: set() for split in ("sft", "grpo")}
    for split, keys in seen.items():
        for seed in range(3):
            problems = make(split, seed=seed)
            keys |= {problem_key(problems[i].entry) for i in range(1500)}
        assert all(split_of(key) == split for key in keys)
    assert not seen["sft"] & seen["grpo"]
    assert not held_out & (seen["sft"] | seen["grpo"])


def test_held_out_problems_are_the_same_for_every_seed():
    assert make("eval", seed=1).held_out(50) == make("eval", seed=2).held_out(50) == make("eval").held_out(500)[:50]


def test_a_problem_is_a_function_of_seed_and_index():
    one, two, other = make(seed=5), make(seed=5), make(seed=6)
    assert [one[i] for i in (7, 0, 3)] == [two[i] for i in (7, 0, 3)]
    assert [one[i] for i in range(20)] != [other[i] for i in range(20)]


def test_a_limit_keeps_the_set_and_reshuffles_every_epoch():
    def epoch(problems, n):
        return [problems[i].prompt for i in range(n * 30, (n + 1) * 30)]

    first, second = epoch(make(limit=30), 0), epoch(make(limit=30), 1)
    assert sorted(first) == sorted(second) == sorted(epoch(make(limit=30, seed=9), 0))
    assert first != second


def test_tasks_without_worked_steps_answer_directly():
    problems = Arithmetic("grpo", task="gcd", worked=False)
    problem = problems[0]
    assert problem.solution.startswith("Answer: ") and problems.score(problem, problem.solution) == 1.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "test"}, "split is 'test', allowed are sft, grpo, eval"),
        ({"split": "sft", "task": "chain_sums"}, "worked is true but task 'chain_sums'"),
        ({"split": "sft", "task": "chain_sums", "worked": False}, "task is 'chain_sums', which reasoning-gym"),
        ({"split": "sft", "options": {"terms": 3}}, "options {'terms': 3} do not suit task 'chain_sum'"),
        ({"split": "sft", "options": {"min_terms": 9}}, "do not suit task 'chain_sum'"),
        ({"split": "sft", "limit": 0}, "limit is 0"),
    ],
)
def test_bad_settings_name_the_key(keys, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        Arithmetic(**keys)


def test_too_few_held_out_problems_is_an_error():
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="500 were asked for"):
        Arithmetic("eval", options=tiny).held_out(500)


def test_slips_are_one_step_off_by_one_and_always_the_same_answers():
    right, problems = make(), make(slips=0.4)
    wrong = 0
    for i in range(300):
        problem, wanted = problems[i], right[i]
        assert problem.prompt == wanted.prompt and problem.solution == problems[i].solution
        lines, sums = problem.solution.split("\n"), wanted.solution.split("\n")
        if problems.score(problem, problem.solution) == 1.0:
            assert lines == sums
            continue
        wrong += 1
        off = [int(result) - eval(left) for left, _, result in (line.partition(" = ") for line in lines[:-1])]
        assert sorted(map(abs, off)) == [*[0] * (len(off) - 1), 1]
        assert lines[-1] == f"Answer: {lines[-2].split()[-1]}"
    assert 90 <= wrong <= 150
    with pytest.raises(ValueError, match=r"slips is 0\.3"):
        make(slips=0.3, worked=False)
