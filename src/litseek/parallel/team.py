"""The ranks of a run at work together: process groups, what of the model lies where, who sends what to whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litseek.inference.engine import Engine
from litseek.models.transformer import Transformer, build
from litseek.parallel.dispatchers import Choice, Dispatchers
from litseek.parallel.executor import Executor, Pipeline
from litseek.parallel.lanes import Lanes
from litseek.parallel.mesh import Groups, Mesh, Ranks
from litseek.parallel.partition import Layout, Partition, Placement
from litseek.parallel.pieces import Piece
from litseek.parallel.sums import Sums
from litseek.parallel.transport import PeerToPeer
from litseek.parallel.zero import Share, Shares


class Team:
    """One rank's view of all of them. Made on all ranks alike, since process groups are."""

    def __init__(
        self, mesh: Mesh, schedule: str | None, timeout: timedelta, device: torch.device, choice: Choice
    ) -> None:
        self.mesh, self.schedule, self.device, self.choice = mesh, schedule, device, choice
        self.layout = Layout.of(schedule, mesh.pp)
        self.groups = Groups(mesh, timeout)
        self.plan: Partition | None = None
        host = None
        if mesh.world > 1:
            if dist.get_backend() != "gloo":
                host = dist.new_group(backend="gloo", timeout=timeout)
            few = max(1, choice.sms // 4)  # one transfer at a time each way, which waits for its partner where it runs
            self.groups.make("down", mesh.neighbours(), few)
            self.groups.make("up", mesh.neighbours(), few)
        self.sums = Sums(mesh, host)
        self.dispatchers = Dispatchers(choice, mesh, self.groups, self.sums, timeout) if mesh.ep > 1 else None

    def close(self) -> None:
        """Give the process groups back, with their threads and what they hold of a GPU's memory, after the last use on all
        ranks: a process may train another stage next."""
        if self.mesh.world == 1:
            return
        dist.barrier()
        self.groups.close()
        if self.sums.host_group is not None:
            dist.destroy_process_group(self.sums.host_group)

    # -- the model ----------------------------------------------------------------------------------------------

    def partition(self, model: Any, phases: Sequence[Any], seq_len: int) -> None:
        """Cut a whole model to this rank's part; a second model of the same shape is cut alike."""
        if self.mesh.world == 1 and self.layout.num_stages == 1:
            return
        if self.plan is None:
            self.plan = Partition.plan(model, phases, self.mesh, self.layout, seq_len)
            self.groups.make("replicas", self.plan.all_replicas)
        self.plan.apply(model, None if self.dispatchers is None else partial(self.dispatchers.make, model))

    def _ep_ranks(self) -> Ranks:
        return next(group for group in self.mesh.ep_groups() if self.mesh.rank in group)

    def group(self, replicas: Ranks) -> dist.ProcessGroup | None:
        return self.groups.get("replicas", replicas)

    def placement(self, name: str, tensor: Tensor) -> Placement:
        """Of a tensor of this rank's part."""
        if self.plan is not None:
            return self.plan.placements[name]
        shape = tuple(tensor.shape)
        return Placement(name, shape, 0, shape[0] if shape else 1, (self.mesh.rank,))

    @torch.no_grad()
    def align(self, model: Any) -> None:
        """All who hold the same rows take the first one's numbers."""
        if self.plan is None:
            return
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            replicas = self.plan.placements[name].replicas
            if len(replicas) > 1:
                dist.broadcast(tensor.data, replicas[0], group=self.group(replicas))

    @torch.no_grad()
    def fill(self, model: Transformer, given: Callable[[dict[str, Piece]], bool], seed: int) -> None:
        """Memory for a part that has none yet, and its numbers: ``given`` fills the pieces, or says that there is
        nothing to fill them with; then they are drawn, as on one device, where the whole tensor passes through memory."""
        model.to_empty(device=self.device)
        for router in model.balance_routers().values():
            router.e_score_correction_bias.zero_()
        held = model.state_dict(keep_vars=True)
        pieces = {name: self._piece(tensor.data, self.placement(name, tensor)) for name, tensor in held.items()}
        if given(pieces):
            return
        for name, parameter in model.named_parameters():
            place = self.placement(name, parameter)
            if place.rows == place.shape[0]:
                model.draw(name, parameter, seed)
                continue
            whole = parameter.new_empty(place.shape)
            model.draw(name, whole, seed)
            parameter.copy_(whole[place.start : place.start + place.rows])

    def shares(self, model: Any, split: bool) -> Shares:
        named = list(model.named_parameters())
        placements = {name: self.placement(name, parameter) for name, parameter in named}
        return Shares(named, placements, self.mesh.rank, self.mesh.dp, self.group, split)

    # -- the step -----------------------------------------------------------------------------------------------

    def executor(
        self, model: Any, phases: Sequence[Any], chunks: int, recompute: Callable[[str], bool], overlap: bool
    ) -> Executor:
        if self.plan is None or self.layout.num_stages == 1:
            made = Executor(phases, chunks, recompute, overlap)
        else:
            stages, beside = self.plan.stages(phases), overlap and self.mesh.ep > 1
            made = Executor.staged(stages, self.layout.num_stages, recompute, self._pipeline(), beside)
        if overlap and self.device.type == "cuda":
            made.lanes = Lanes(self.device, model.parameters, self.choice.sms)
        if self.dispatchers is not None:
            made.score = self.dispatchers.score
        return made

    def _pipeline(self) -> Pipeline:
        assert self.schedule is not None and self.plan is not None
        ranks = [self.mesh.at(place) for place in range(self.mesh.pp)]

        def channel(source: int, target: int) -> dist.ProcessGroup | None:
            pair = ranks[min(source, target)], ranks[max(source, target)]
            return self.groups.get("down" if source < target else "up", pair)

        transport = PeerToPeer(ranks, channel, self.plan.width, self.plan.dtype, self.device)
        return Pipeline(self.schedule, self.mesh.pp, self.mesh.pp_rank, transport)

    # -- generation ---------------------------------------------------------------------------------------------

    def engine(self, model: Transformer) -> Engine:
        """Generates with the model's present weights, on all ranks at once, each for prompts of its own.

        Experts stay where they are and ranks keep pace; what a pipeline has cut is gathered into a copy, which lives as
        long as the engine.
        """
        if self.mesh.pp > 1:
            copy = self.whole(model)
            copy.attach()
            return Engine(copy)
        return Engine(model, pace=self._pace if self.mesh.ep > 1 else None)

    def _pace(self, active: bool) -> bool:
        """Whether any rank that shares the experts is active."""
        flag = torch.tensor(float(active), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.groups.get("forward", self._ep_ranks()))
        return bool(flag)

    @torch.no_grad()
    def whole(self, model: Transformer) -> Transformer:
        """A copy of the model that holds everything, on every rank.

        Rows travel tensor by tensor from one of their holders to all ranks.
        """
        assert self.plan is not None
        with torch.device(self.device):
            copy = build(model.cfg, model.precision)
        own = model.state_dict()
        for name, target in copy.state_dict().items():
            sets = self.plan.owner[name]
            rows = (target.shape[0] if target.ndim else 1) // len(sets)
            for part, replicas in enumerate(sets):
                place = target[part * rows : (part + 1) * rows] if len(sets) > 1 else target
                if self.mesh.rank == replicas[0]:
                    place.copy_(own[name])
                dist.broadcast(place, replicas[0])
        return copy.requires_grad_(False).eval()

    def pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Piece]:
        """Tensors that lie as the model's of the same names do, for a checkpoint."""
        if self.plan is None:
            return dict(tensors)
        return {name: self._piece(tensor, self.placement(name, tensor)) for name, tensor in tensors.items()}

    def _piece(self, tensor: Tensor, place: Placement) -> Piece:
        return Piece(tensor, place.start, place.shape, self.mesh.rank == place.replicas[0])

    def state_of(self, share: Share, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state of a share, for a checkpoint: tensors of the parameter's shape are rows of it."""
        if self.plan is None:
            return dict(state)
        place, found = share.placement, dict(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == share.part.shape:
                writes = share.split or self.mesh.rank == place.replicas[0]
                found[key] = Piece(value, place.start + share.begin, place.shape, writes)
            else:
                found[key] = Piece(value, 0, tuple(value.shape), self.mesh.rank == place.replicas[0])
        return found

    def wanted(self, shares: Mapping[str, Share]) -> Callable[[str, tuple[int, ...]], tuple[int, int] | None] | None:
        """Which rows of a checkpoint's tensors belong here; None if all do."""
        if self.plan is None:
            return None
        plan = self.plan

        def rows(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
            parts = path.split("/")
            whole = (0, shape[0] if shape else 1)
            if parts[0] == "optimizer_states":
                share = shares.get(parts[3])
                if share is None:
                    return None
                alike = shape == share.placement.shape
                return (share.placement.start + share.begin, share.end - share.begin) if alike else whole
            if parts[0] != "state_dict" and "average" not in parts:
                return whole
            place = plan.placements.get(parts[-1])
            return None if place is None else (place.start, place.rows)

        return rows
