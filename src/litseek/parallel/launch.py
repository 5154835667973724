"""Starts the other ranks of this machine as copies of the command, where neither torchrun nor SLURM did."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from litseek.parallel import watchdog


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, but a copy that ends early is named, and this process ends with status 1 instead of killing itself."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **keys: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[watchdog.PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[watchdog.PARENT]
            threading.Thread(target=self._observe, daemon=True, name="litseek-launcher").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **keys)

    def _observe(self) -> None:
        """Until the ranks are connected, when the watchdog sees more than the end of a process."""
        while not watchdog.watching():
            for local_rank, process in enumerate(self.procs, 1):
                if (status := process.poll()) is not None and not watchdog.watching():
                    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
                    print(
                        f"litseek: rank {local_rank} of this machine ended {how} before training began.",
                        file=sys.stderr,
                    )
                    self.kill(signal.SIGKILL)
                    sys.stderr.flush()
                    os._exit(1)
            time.sleep(0.5)
