"""samples.jsonl holds each step's answers once, also after a kill."""

import json

from litseek.stages.accuracy import _append


def test_answers_of_a_step_that_runs_again_replace_the_old_ones(tmp_path):
    path = tmp_path / "stage" / "samples.jsonl"
    _append(path, 0, [{"prompt": "1 + 1 ="}])
    _append(path, 4, [{"prompt": "2 + 2 ="}, {"prompt": "line\u2028break"}])
    _append(path, 4, [{"prompt": "again"}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["step"], row["prompt"]) for row in rows] == [(0, "1 + 1 ="), (4, "again")]
