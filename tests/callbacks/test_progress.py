"""What is shown while training, with and without a terminal."""

import io

from litseek.callbacks import Progress
from tests.callbacks.stage import TinyStage, trainer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_now_and_then_and_one_at_the_end(tmp_path, capsys):
    trainer(tmp_path, [Progress(seconds=3600)], 5, enable_progress_bar=True).fit(TinyStage())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tiny")]
    assert len(lines) == 1
    assert lines[0].startswith("tiny  step 5/5  loss ") and "tokens/s" in lines[0] and lines[0].endswith("0:00 left")
    trainer(tmp_path, [Progress(seconds=0)], 5, enable_progress_bar=True).fit(TinyStage())
    assert sum(line.startswith("tiny") for line in capsys.readouterr().err.splitlines()) == 5


def test_on_a_terminal_a_bar_with_loss_and_speed(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    trainer(tmp_path, [Progress(refresh=0)], 5, enable_progress_bar=True).fit(TinyStage())
    shown = screen.getvalue()
    assert "tiny" in shown and "5/5" in shown and "loss" in shown and "tokens/s" in shown


def test_disabled_it_shows_nothing(tmp_path, capsys):
    progress = Progress(seconds=0)
    progress.disable()
    trainer(tmp_path, [progress], 3, enable_progress_bar=True).fit(TinyStage())
    assert "tiny" not in capsys.readouterr().err
