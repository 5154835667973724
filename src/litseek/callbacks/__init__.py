"""Lightning callbacks and the metrics file of a run.

They ask of a stage: ``model`` (with ``cfg``), ``data.seq_len``, ``tokens_seen`` and, after a step, ``step_result`` with
``loss``, ``grad_norm``, ``finite`` and ``loads`` (phase name -> tokens of each expert in the global batch).
"""

from litseek.callbacks.ema import WeightAverage
from litseek.callbacks.metrics_csv import MetricsCSV
from litseek.callbacks.progress import Progress
from litseek.callbacks.routing import RoutingStats
from litseek.callbacks.spike import SpikeGuard
from litseek.callbacks.throughput import Throughput

__all__ = ["MetricsCSV", "Progress", "RoutingStats", "SpikeGuard", "Throughput", "WeightAverage"]
