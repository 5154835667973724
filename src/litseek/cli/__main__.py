"""The `litseek` command: finds the command, composes its configuration, runs it, and turns errors into one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from types import ModuleType

from litseek.cli import help as help_text
from litseek.cli.compose import Composed, cluster_of, jobs, make
from litseek.cli.errors import Usage, wants_traceback
from litseek.cli.overrides import Request, parse
from litseek.cli.say import say
from litseek.cli.status import report
from litseek.parallel import watchdog


@dataclass(frozen=True)
class Command:
    """One row of `litseek --help`. `module` offers `run(cfg)`, perhaps `check(cfg)`; `positional` is the key of a bare first argument."""

    module: str
    line: str
    positional: str | None = None


COMMANDS = {
    "train": Command("litseek.cli.train", "train one stage: stage=pretrain, context_32k, context_128k, sft or grpo"),
    "pipeline": Command(
        "litseek.cli.pipeline", "run all stages in order, each from its parent; finished ones are skipped"
    ),
    "generate": Command("litseek.cli.generate", "answer a prompt, a file of prompts, or chat when there is no prompt"),
    "convert": Command("litseek.cli.convert", "read and write the released Hugging Face layout, FP8 or BF16"),
    "bench": Command("litseek.cli.bench", "time the training step, its parts and the kernels, beside peers"),
    "plan": Command(
        "litseek.cli.plan", "what a pipeline schedule costs before it runs: bubble, activations, a picture"
    ),
    "report": Command(
        "litseek.cli.report", "turn a run or an experiments folder into a page, tables and plots", "folder"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed, 2 not understood, 130 interrupted, 143 stopped by SIGTERM and saved."""
    # Read when torch loads OpenMP, which no import above does. Waiting threads that spin (the default) slow a step 25 times
    # when another process wants the same core: 6.0 s against 0.24 s for 2048 tokens of the tiny model on 2 cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text.overview({name: command.line for name, command in COMMANDS.items()}))
        return 0 if argv else 2
    traceback = wants_traceback(argv)
    watchdog.follow_parent()
    alike = True  # until work begins, the ranks of a machine see the same command and the same files
    try:
        if (work := _prepare(argv[0], argv[1:])) is not None:
            alike = False
            _run(*work)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status, _ = report(error, alike)
        if traceback and status in (1, 2):
            raise
        return status


def _prepare(name: str, argv: list[str]) -> tuple[ModuleType, list[Composed]] | None:
    """The command's module and its jobs, all of them checked; None when something was shown instead."""
    if name not in COMMANDS:
        raise Usage.nearest(f"'{name}' is not a command", name, COMMANDS)
    command = COMMANDS[name]
    if {"-h", "--help"} & set(argv):
        print(help_text.command(name, command.line))
        return None
    request: Request = parse(argv, positional=command.positional)
    composed: list[Composed] = jobs(name, request)
    if request.show:
        for job in composed:
            print(job.yaml(), end="")
        return None
    module = importlib.import_module(command.module)
    for job in composed if hasattr(module, "check") else ():
        module.check(job.cfg)
    return module, composed


def _run(module: ModuleType, composed: list[Composed]) -> None:
    if (cluster := cluster_of(composed[0].cfg)) is not None:
        make(cluster).submit(module.__name__, composed)
        return
    for number, job in enumerate(composed, 1):
        if len(composed) > 1:
            say(f"[{number}/{len(composed)}] {job.title}")
        module.run(job.cfg)


if __name__ == "__main__":
    raise SystemExit(main())
