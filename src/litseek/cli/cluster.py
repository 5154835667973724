"""`cluster=slurm`: jobs go to a queue, through hydra-submitit-launcher, instead of running here.

A job holds the configuration that was checked when it was submitted, and runs it on every rank that the scheduler starts.
Asked to stop (preempted, or its time is up), it saves after the step in progress and puts itself back into the queue.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher, LocalLauncher, SlurmLauncher
from omegaconf import DictConfig, OmegaConf
from submitit import JobEnvironment
from submitit.core.utils import UncompletedJobError

from litseek.cli.compose import Composed
from litseek.cli.say import say
from litseek.cli.status import report
from litseek.errors import LitseekError, Preempted


class JobFailed(Exception):
    """What a job of the queue ends with; its sentence has been said in its log already."""


class Submits(BaseSubmititLauncher):
    """The plugin's launcher with our commands for its tasks. `params`: conf/cluster/slurm.yaml."""

    module: str
    cfgs: list[DictConfig]

    def submit(self, module: str, jobs: Sequence[Composed]) -> None:
        """Queue the jobs, all in one array, and wait for them.

        Errors: LitseekError with the sentence of the first job that failed, or where its log lies.
        """
        self.check()
        self.module, self.cfgs = module, [job.cfg for job in jobs]
        base = Path(os.path.commonpath([str(job.cfg.run_dir) for job in jobs])) / ".submitit"
        self.params["submitit_folder"] = str(base / "%j")
        self.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(base)}}})
        say(f"{len(jobs)} job{'s' if len(jobs) > 1 else ''} for the queue, each rank's log in {base}/<job>.")
        try:
            self.launch([list(job.overrides) for job in jobs], 0)
        except UncompletedJobError as error:
            found = re.search(r"JobFailed: (.+)", str(error))
            raise LitseekError(found[1] if found else f"{base}: a job ended early; its ranks' logs say why.") from error
        except KeyboardInterrupt:
            say("No longer waiting; the jobs go on without this command.")
            raise SystemExit(130) from None

    def check(self) -> None:
        """What can be refused before anything is queued."""
        if not isinstance(self.params["tasks_per_node"], int):
            raise LitseekError(
                f"trainer.devices={self.params['tasks_per_node']} must be a number of GPUs a node with cluster=slurm."
            )

    def owns(self, environment: JobEnvironment) -> bool:
        """Whether a stopped job is to queue itself again."""
        return True

    def __call__(self, overrides: Any, key: Any, number: int, *_: Any) -> None:  # type: ignore[override]
        """One rank of job ``number``, in its own process."""
        environment = JobEnvironment()
        take_ranks(environment)
        try:
            importlib.import_module(self.module).run(self.cfgs[number])
        except Preempted as stop:
            say(f"litseek: {stop}")
            if self.owns(environment):
                signal.raise_signal(environment._usr_sig())  # submitit's handler: rank 0 queues the job again and exits
            raise SystemExit(0) from None
        except Exception as error:
            sys.tracebacklimit = 1000 if self.cfgs[number].debug else 0
            sentence = report(error)[1]
            raise JobFailed(sentence) from None


class Slurm(Submits, SlurmLauncher):
    """Through sbatch."""

    def check(self) -> None:
        super().check()
        if shutil.which("sbatch") is None:
            raise LitseekError("cluster=slurm: there is no sbatch on this machine; submit from a node that has it.")

    def owns(self, environment: JobEnvironment) -> bool:
        """A job that SLURM is ending already is SLURM's: it does not come back after scancel."""
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", environment.raw_job_id, "--format", "%T"], capture_output=True, text=True
        )
        return asked.returncode != 0 or asked.stdout.strip() in ("RUNNING", "")


class Local(Submits, LocalLauncher):
    """The same on this machine, without a queue: for tests."""


def take_ranks(environment: JobEnvironment) -> None:
    """The scheduler's ranks as the variables that torchrun would set."""
    here = {
        "RANK": environment.global_rank,
        "LOCAL_RANK": environment.local_rank,
        "NODE_RANK": environment.node,
        "WORLD_SIZE": environment.num_tasks,
        "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": 15000 + int(environment.raw_job_id[-4:]),
    }
    os.environ.update({name: str(value) for name, value in here.items()})
