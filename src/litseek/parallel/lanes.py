"""Two micro-batches at once on one GPU: a CUDA stream for each, so that the exchanges of one run beside the products of
the other (report §3.2.1, figure 4).

A micro-batch's stage runs forward and backward on one lane. Gradients are added to the parameters on the stream that the
step began on: whoever adds waits for whoever made the gradient, and nobody waits for the adding before the step's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from litseek.copies import add_gradient, compute_copy

ARRIVALS = 2
"""The lane on which receives are posted: nothing else waits there."""


class OneLane:
    """Everything on the stream that is there, as on a CPU."""

    @contextmanager
    def open(self) -> Iterator[None]:
        yield

    def on(self, lane: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def hand_over(self, state: Mapping[str, Any], origin: int, lane: int) -> None:
        """What was made on ``origin`` is used on ``lane`` from here on."""

    def add(self, weight: Tensor, grad: Tensor) -> None:
        """To the gradient of a weight, or of the master of a copy."""
        add_gradient(weight, grad)


class Lanes(OneLane):
    """Two of them and one for arrivals. ``parameters`` gives all that get gradients in a step.

    Products leave ``sms`` multiprocessors to the exchanges: of a persistent kernel that starts a program for each one,
    those that find no place would come in a second wave, and the product take twice as long.
    """

    def __init__(self, device: torch.device, parameters: Callable[[], Iterable[Tensor]], sms: int) -> None:
        self.parameters, self.sms = parameters, sms
        self.streams = [torch.cuda.Stream(device) for _ in range(3)]
        self.main = torch.cuda.current_stream(device)
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # it is what is wanted here

    @contextmanager
    def open(self) -> Iterator[None]:
        self.main = torch.cuda.current_stream()
        copies = ((parameter, compute_copy(parameter)) for parameter in self.parameters())
        leaves = [leaf for pair in copies for leaf in pair if leaf is not None and leaf.requires_grad]
        # a leaf's accumulation runs on the stream on which its node was made, and lives as long as somebody holds it
        accumulators = [get_gradient_edge(leaf) for leaf in leaves]
        for stream in self.streams:
            stream.wait_stream(self.main)
        before = torch._C._get_sm_carveout_experimental()
        torch._C._set_sm_carveout_experimental(self.sms)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(before)
        for stream in self.streams:
            self.main.wait_stream(stream)
        del accumulators

    def on(self, lane: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.streams[lane])

    def hand_over(self, state: Mapping[str, Any], origin: int, lane: int) -> None:
        if origin == lane:
            return
        if origin != ARRIVALS:  # there the transport waits
            self.streams[lane].wait_stream(self.streams[origin])
        for value in state.values():
            if isinstance(value, Tensor):
                value.record_stream(self.streams[lane])

    def add(self, weight: Tensor, grad: Tensor) -> None:
        self.main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.main):
            grad.record_stream(self.main)
            add_gradient(weight, grad)
