"""The dispatcher over shared memory means what the local one means on the gathered tokens.

On a CPU two processes share files and the kernels run in Triton's interpreter; under the marker gpu, two GPUs of a node.
"""

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litseek.models.dispatch import LocalDispatcher
from litseek.parallel import symmetric
from litseek.parallel.dispatch import AllToAllDispatcher
from litseek.parallel.dispatchers import Dispatchers
from litseek.parallel.strategy import LitseekStrategy
from litseek.parallel.symmetric import Exchange, SymmetricDispatcher
from litseek.precision import BF16, FP8
from tests.parallel.layouts import joined, train_here
from tests.parallel.test_layouts import same
from tests.ranks import KEPT, Ranks

W, E, D, K, T = 2, 4, 32, 2, 6
CASES = {
    "even": "the same number of tokens on each rank",
    "unequal": "another one on each",
    "all to one expert": "of the last rank",
    "all away": "no rank chooses an expert of its own",
    "none away": "each rank chooses its own only",
    "a rank without tokens": "the first one",
    "no tokens": "on any rank",
}
PAIRS = [
    ("even", "unequal"),
    ("all to one expert", "even"),
    ("all away", "none away"),
    ("a rank without tokens", "no tokens"),
]
"""Two micro-batches at once: the gate's weights go into the first one's experts, as in a block, and into the other's combine."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pair(request):
    """Runs functions on two ranks, which get the device first."""
    if request.param == "cuda" and torch.cuda.device_count() < W:
        pytest.skip("needs two GPUs")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")  # the processes start with it
        pool = Ranks(W, method="spawn")
    yield lambda function, *args: pool.run(function, request.param, *args, timeout=300)
    for process in pool.processes:
        process.terminate()


@cache
def group(device: str) -> dist.ProcessGroup:
    if device == "cpu":
        return dist.group.WORLD
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    torch.cuda.set_device(dist.get_rank())
    KEPT.append(dist.new_group(list(range(W)), backend="nccl"))
    return KEPT[-1]


def share_files(nbytes: int, group: dist.ProcessGroup):
    """Memory of processes, for a CPU."""
    folder = [tempfile.mkdtemp(prefix="litseek-")]
    dist.broadcast_object_list(folder, 0, group)
    files = [Path(folder[0]) / str(rank) for rank in range(W)]
    maps = [torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8) for file in files]
    dist.barrier(group)
    files[dist.get_rank(group)].unlink()
    dist.barrier(group)
    if dist.get_rank(group) == 0:
        Path(folder[0]).rmdir()
    return maps[dist.get_rank(group)], torch.tensor([one.data_ptr() for one in maps]), maps


def exchange(device: str, hidden: int = D, dtype: torch.dtype = torch.float32, **settings) -> Exchange:
    """With room for more tokens than come; the interpreter runs programs one after another."""
    settings = {"share": share_files, "programs": 3} | settings if device == "cpu" else settings
    return Exchange(E, group(device), T + 2, K, hidden, dtype, **{"timeout_s": 30} | settings)


def routing(case: str, hidden: int = D) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, expert, weight) of each rank."""
    g, made, L = torch.Generator().manual_seed(4), [], E // W
    for rank in range(W):
        tokens = {"unequal": 3 + 4 * rank, "a rank without tokens": T * (rank > 0), "no tokens": 0}.get(case, T)
        expert = torch.rand(tokens, E, generator=g).topk(K).indices
        if case == "all to one expert":
            expert = torch.full((tokens, K), E - 1)
        if case in ("all away", "none away"):
            expert = expert % L + (rank + (case == "all away")) % W * L
        x, weight = torch.randn(tokens, hidden, generator=g), torch.rand(tokens, K, generator=g)
        made.append((x, expert, weight))
    return made


def weights(hidden: int = D) -> Tensor:
    return torch.randn(E, hidden, hidden, generator=torch.Generator().manual_seed(5)) / hidden**0.5


class Through:
    """One micro-batch's forward; its backward comes later."""

    def __init__(self, dispatcher, x: Tensor, expert: Tensor, weight: Tensor, own_EDD: Tensor, inside: bool) -> None:
        self.leaves = x, weight, own = [t.clone().requires_grad_() for t in (x, weight, own_EDD)]
        rows, self.count, plan = dispatcher.dispatch(x, expert, weight)
        counts = self.count.tolist()
        used = sum(counts)
        self.rows = rows[:used]
        parts = zip(self.rows.split(counts), own)
        self.out = torch.cat([torch.tanh(part @ matrix.to(part.dtype)) for part, matrix in parts])
        if inside:
            gated = (self.out * dispatcher.row_weights(plan)[:used, None]).to(self.out.dtype)
            self.y = dispatcher.combine(gated, plan.with_weight(None))
        else:
            self.y = dispatcher.combine(self.out, plan)
        self.out.retain_grad()

    def backward(self) -> list[Tensor]:
        """Output, counts, gradients. The output's gradient depends on the token alone."""
        self.y.backward(self.leaves[0].detach().sin().to(self.y.dtype))
        return [t.detach().cpu() for t in (self.y, self.count, *(leaf.grad for leaf in self.leaves))]


def mine(device: str, case: str, hidden: int = D) -> tuple[Tensor, ...]:
    rank = dist.get_rank()
    return tuple(t.to(device) for t in (*routing(case, hidden)[rank], weights(hidden).chunk(W)[rank]))


def every_case(device: str) -> list[list[Tensor]]:
    """Two micro-batches in flight at once, on a GPU on two streams, through one exchange for all cases."""
    group(device)
    lanes = [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else [None, None]
    dispatcher = SymmetricDispatcher(exchange(device, lanes=2))
    found = []
    for cases in PAIRS:
        inputs = [mine(device, case) for case in cases]
        if device == "cuda":
            torch.cuda.synchronize()
        both = []
        for tensors, inside, lane in zip(inputs, (True, False), lanes):
            with torch.cuda.stream(lane):
                both.append(Through(dispatcher, *tensors, inside))
        for one, lane in zip(both, lanes):
            with torch.cuda.stream(lane):
                found.append(one.backward())
    assert not dispatcher.exchange.late and not dispatcher.exchange.overflowed
    return found


def test_outputs_and_gradients_equal_the_local_dispatcher(pair):
    assert {case for cases in PAIRS for case in cases} == set(CASES)
    found = iter(zip(*pair(every_case)))
    for cases in PAIRS:
        for case, inside in zip(cases, (True, False)):
            x, expert, weight = (torch.cat(parts) for parts in zip(*routing(case)))
            wanted = Through(LocalDispatcher(E), x, expert, weight, weights(), inside).backward()
            for parts, expected in zip(zip(*next(found)), wanted):
                torch.testing.assert_close(torch.cat(parts), expected, rtol=2e-5, atol=1e-5)


def with_little_room(device: str) -> tuple[list[Tensor], list[int]]:
    """The protocol of a step: ask all ranks, make room, run again."""
    dispatcher = SymmetricDispatcher(exchange(device, factor=3 / ((T + 2) * K)))
    grown = []
    while True:
        found = Through(dispatcher, *mine(device, "unequal"), inside=True).backward()
        over = dispatcher.exchange.overflowed.cpu().int()
        dist.all_reduce(over)
        if not over:
            return found, grown
        grown.append(dispatcher.exchange.grow())


def test_a_step_that_overflowed_is_right_when_it_runs_again_with_room(pair):
    results = pair(with_little_room)
    x, expert, weight = (torch.cat(parts) for parts in zip(*routing("unequal")))
    wanted = Through(LocalDispatcher(E), x, expert, weight, weights(), True).backward()
    for parts, expected in zip(zip(*(found for found, _ in results)), wanted):
        torch.testing.assert_close(torch.cat(parts), expected, rtol=2e-5, atol=1e-5)
    here = [int((expert // (E // W) == rank).sum()) for rank in range(W)]
    assert [grown for _, grown in results] == [[rows - 3] for rows in here]


def formats(device: str, fp8: bool) -> list[list[Tensor]]:
    """Rows that arrived, gradients of the experts' outputs, the rest; through this dispatcher and through its sibling."""
    precision, hidden = FP8() if fp8 else BF16(), 256
    ours = SymmetricDispatcher(exchange(device, hidden, torch.bfloat16), precision)
    os.environ.pop("TRITON_INTERPRET", None)  # other ops run their references
    found = []
    for dispatcher in (ours, AllToAllDispatcher(E, group(device), precision=precision)):
        run = Through(dispatcher, *mine(device, "even", hidden), inside=True)
        y, count, *grads = run.backward()
        assert run.rows.dtype == y.dtype == torch.bfloat16
        found.append([run.rows.detach().cpu(), count, run.out.grad.cpu(), y, *grads])
    return found


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_rows_and_gradients_travel_in_the_precision_s_format(pair, fp8):
    for ours, sibling in pair(formats, fp8):
        assert all(torch.equal(got, wanted) for got, wanted in zip(ours[:3], sibling[:3]))
        for got, wanted in zip(ours[3:], sibling[3:]):
            assert got.dtype == wanted.dtype
            bound = 1.5e-2  # sums of BF16 in another order; the interpreter cuts BF16
            assert (got.double() - wanted.double()).norm() <= bound * wanted.double().norm()


def a_peer_is_missing(device: str) -> bool:
    dispatcher = SymmetricDispatcher(exchange(device, timeout_s=1e-4))
    if dist.get_rank() == 0:
        dispatcher.dispatch(*mine(device, "even")[:3])
    dist.barrier()  # its memory stays until then
    return bool(dispatcher.exchange.late)


def test_a_peer_that_does_not_come_is_noticed(pair):
    assert pair(a_peer_is_missing) == [True, False]


def refused(device: str) -> None:
    Exchange(3, group(device), T, K, D, torch.float32)


def test_experts_that_do_not_divide_are_refused(pair):
    with pytest.raises(RuntimeError, match=r"model\.n_routed_experts=3 is not a multiple of the 2 ranks"):
        pair(refused)


def trained(device: str, folder: Path, layout: dict[str, Any]) -> tuple[dict[str, Any], list[int | None]]:
    """A run of two steps with a validation after the second, and how often each step ran again."""
    retries: list[int | None] = []

    def train(self: Dispatchers, *args: Any) -> Any:
        found = before(self, *args)
        retries.append(found[1])
        return found

    before = Dispatchers.train
    os.environ.pop("TRITON_INTERPRET", None)  # other ops run their references
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatchers, "train", train)
        if device == "cpu":
            patch.setattr(symmetric, "share", share_files)
            patch.setattr(LitseekStrategy, "check_nodes", lambda self: None)
        run = train_here(
            folder, dict(ep=2, comm_sms=3, timeout_s=60) | layout, steps=2, model=dict(num_hidden_layers=2), batch=4
        )
    return run, retries


def test_training_with_too_little_room_equals_training_with_enough(pair, tmp_path):
    wanted = [run for run, _ in pair(trained, tmp_path / "hops", {})]
    layout = dict(dispatcher="symmetric", capacity_factor=0.4, overlap=True)
    runs, retries = zip(*pair(trained, tmp_path / "little", layout))
    assert retries[0] == retries[1] and retries[0][0] >= 1
    expected = {key: joined(wanted, key) if key in ("state", "average") else wanted[0][key] for key in wanted[0]}
    same(list(runs), expected)
