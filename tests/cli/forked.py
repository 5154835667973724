"""Runs the command line in forked children of one process that has imported everything, so that a start costs nothing.

As a program it reads argument lists (JSON) from stdin and answers each with the child's pid, and at the child's end with
its status. Each child writes to a log and answers SIGUSR1 with its stacks, which is how a test knows what it is at.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Runner:
    """The test's side. Use as a context manager; `folder` gets the logs."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **env}, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def start(self, *argv: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        self.count += 1
        return int(self._line())

    def wait(self) -> int:
        """Exit status of the child that was started last; -9 when it was killed."""
        return int(self._line())

    def run(self, *argv: str) -> str:
        """Start, wait, and return what was printed; the child must end well."""
        self.start(*argv)
        status = self.wait()
        assert status == 0, f"status {status}:\n{self.log()}"
        return self.log()

    def log(self) -> str:
        return (self.folder / f"{self.count}.log").read_text()

    def kill_in(self, pid: int, function: str, after: Callable[[], bool], limit_s: float = 60) -> None:
        """SIGKILL as soon as `after` holds and a thread is inside `function`."""
        stacks, seen, end = self.folder / f"{self.count}.stacks", 0, time.monotonic() + limit_s
        while time.monotonic() < end:
            assert _alive(pid), f"the child ended before it was in {function}:\n{self.log()}"
            if after():
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.002)
                text = stacks.read_text()
                if f" in {function}\n" in text[seen:]:
                    os.kill(pid, signal.SIGKILL)
                    assert self.wait() == -signal.SIGKILL
                    return
                seen = len(text)
            time.sleep(0.002)
        raise AssertionError(f"the child was never in {function}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the forking process died"
        return line


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _serve(folder: Path) -> None:
    import litseek.cli.pipeline
    import litseek.stages.grpo
    import litseek.stages.pretrain  # noqa: F401
    from litseek.cli.__main__ import main

    for number, line in enumerate(sys.stdin, 1):
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            stacks = (folder / f"{number}.stacks").open("w")
            # a handler that Python knows of: Lightning would reset what faulthandler.register installs
            signal.signal(signal.SIGUSR1, lambda *_: faulthandler.dump_traceback(stacks))  # noqa: B023
            status = 70
            try:
                status = main(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
