"""The Lightning strategy: expert parallelism, pipelines and ZeRO-1 under any stage (report §3.2).

Lightning's closure runs training_step, zero_grad and backward in this order. Here the executor has already run
backward inside training_step, so gradients are cleared when a step starts, `optimizer_zero_grad` of the stage does
nothing, and `backward` only calls the hooks. Automatic optimization stays on: clipping, schedulers and callbacks work.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import ReduceOp, _init_dist_connection, _sync_ddp_if_available
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from litseek.data.batch import MicroBatch
from litseek.optim import AdamW
from litseek.parallel import preempt, storage
from litseek.parallel.checkpoint import check_same_model, resolve_checkpoint
from litseek.parallel.dispatchers import Choice
from litseek.parallel.executor import Executor, HeadLoss, StepResult, talks
from litseek.parallel.launch import Launcher
from litseek.parallel.mesh import Mesh
from litseek.parallel.schedule import fewest_micros, make_schedule
from litseek.parallel.settings import check_exchange, check_layout, check_nodes
from litseek.parallel.sums import Sums
from litseek.parallel.team import Team
from litseek.parallel.writer import CheckpointWriter
from litseek.parallel.zero import Share, Shares


class LitseekStrategy(ParallelStrategy):
    """Any layout of ``pp`` x ``ep`` x copies; one process is the smallest.

    ``pp`` ranks hold a pipeline's stages and run ``schedule`` (1f1b, zb1p, dualpipe, dualpipev); ``ep`` ranks share the
    experts; what is left of the world holds copies. ``overlap`` lets one micro-batch's exchanges run beside another's
    computations: on a GPU on streams of their own, with ``comm_sms`` multiprocessors for the exchanges; in a pipeline
    where its schedule pairs two, without one two by two. ``dispatcher`` moves rows: "all_to_all" (torch's collective),
    "symmetric" (our kernels, GPUs of one node) or "hierarchical" (once between nodes, then inside). ``capacity_factor``
    times the even share of rows has room with "symmetric", None all there could be; a step that wants more runs again
    with room for it and counts in the metric "dispatch/retries". ``zero`` splits the optimizer's state over copies
    (ZeRO-1). ``recompute`` names phases that run again in backward. ``checkpoint_async`` writes while training goes on.
    Errors: ValueError naming the key, the value and what is allowed.
    """

    is_distributed = True  # without it Lightning injects no sampler into a user's own DataLoader

    def __init__(
        self,
        pp: int = 1,
        ep: int = 1,
        schedule: str | None = None,
        overlap: bool = False,
        comm_sms: int = 20,
        dispatcher: str = "all_to_all",
        capacity_factor: float | None = None,
        zero: bool = True,
        chunks: int = 1,
        recompute: Sequence[str] = (),
        backend: str | None = None,
        timeout_s: float = 1800,
        checkpoint_async: bool = True,
        **plugins: Any,
    ) -> None:
        super().__init__(**plugins)
        check_layout(pp, ep, schedule, chunks, recompute)
        check_exchange(dispatcher, ep, comm_sms, capacity_factor)
        self.comm_sms, self.dispatcher, self.capacity_factor = comm_sms, dispatcher, capacity_factor
        self.pp, self.ep, self.schedule, self.overlap, self.zero = pp, ep, schedule, overlap, zero
        self.num_chunks, self.recompute = chunks, tuple(recompute)
        self.backend, self.timeout = backend, timedelta(seconds=timeout_s)
        self.checkpoint_async = checkpoint_async
        self._writer: CheckpointWriter | None = None
        self.num_nodes = 1
        self._executor: Executor | None = None
        self._team: Team | None = None
        self._shares: Shares | None = None
        self.step_result: StepResult | None = None
        self._scale: Tensor | None = None
        self.stopping = False
        """Whether a rank was asked to stop before the step in progress began: all ranks do after it."""

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        stage: Any = model
        stage.attached = self

    # -- processes ----------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def ranks_per_node(self) -> int:
        assert self.parallel_devices is not None
        return len(self.parallel_devices)

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.world_size, self.pp, self.ep, self.global_rank)

    @property
    def dp(self) -> int:
        """Ranks that share a global batch."""
        return self.mesh.dp

    @property
    def dp_rank(self) -> int:
        return self.mesh.dp_rank

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.dp, "rank": self.dp_rank}

    @property
    def team(self) -> Team:
        """The process groups; made by the first who asks, on all ranks alike."""
        if self._team is None:
            choice = Choice(self.dispatcher, self.comm_sms, self.capacity_factor, 1 + self.overlap, self.ranks_per_node)
            self._team = Team(self.mesh, self.schedule, self.timeout, self.root_device, choice)
        return self._team

    @property
    def sums(self) -> Sums:
        return self.team.sums

    def filled(self, micros: Sequence[MicroBatch], most: int) -> list[MicroBatch]:
        """This rank's micro-batches and as many blank ones as it takes to run them: ranks that share experts run as many
        as the one with ``most``, and a schedule has its own wishes."""
        wanted = most if self.ep > 1 else len(micros)
        if self.schedule is not None:
            wanted = fewest_micros(self.schedule, self.pp, wanted)
        return [*micros, *(micros[0].blanked() for _ in range(wanted - len(micros)))]

    def check_micros(self, micros: int) -> None:
        """ValueError unless the schedule runs so many micro-batches a step."""
        if self.schedule is not None:
            make_schedule(self.schedule, self.pp, micros)

    def set_world_ranks(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        self.cluster_environment.set_global_rank(self.node_rank * len(self.parallel_devices) + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * len(self.parallel_devices))
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        processes = len(self.parallel_devices)
        Mesh(processes * self.num_nodes, self.pp, self.ep)  # whose sizes must fit: said once, before there are others
        self.check_nodes()
        if processes * self.num_nodes > 1:
            self._launcher = Launcher(self.cluster_environment, processes, self.num_nodes)

    def check_nodes(self) -> None:
        """ValueError where the dispatcher cannot run on these nodes."""
        check_nodes(self.dispatcher, self.ep, self.ranks_per_node, self.root_device.type)

    def setup_environment(self) -> None:
        if type(self.precision_plugin) is not Precision:
            raise ValueError(
                f"trainer.precision asks for {type(self.precision_plugin).__name__}, but precision is built into the "
                "model: leave trainer.precision out and choose precision=fp32 or precision=bf16."
            )
        super().setup_environment()
        self.set_world_ranks()
        if self.world_size > 1:
            assert self.cluster_environment is not None
            backend = self.backend or ("nccl" if self.root_device.type == "cuda" else "gloo")
            device = None if backend == "gloo" else self.root_device
            _init_dist_connection(self.cluster_environment, backend, timeout=self.timeout, device_id=device)
        assert self.mesh  # whose sizes must fit the world

    def setup(self, trainer: Trainer) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not supported, only 1: "
                "one step is one global batch; raise stage.batch or lower stage.micro_batch instead."
            )
        self.place()
        super().setup(trainer)

    restore_checkpoint_after_setup = True  # type: ignore[assignment]  # a rank reads its own part only

    @property
    def spread(self) -> bool:
        """Whether a rank holds less than the model: then it is made without memory, cut, and filled in `place`."""
        return self.mesh.world > 1

    def place(self) -> None:
        """Cut the stage's model to this rank's part and fill it: with the parent's weights, or fresh ones."""
        stage: Any = self.lightning_module
        self.team.partition(self._module, stage.phases(), getattr(stage.data, "seq_len", 1))
        if any(tensor.is_meta for tensor in self._module.parameters()):
            self.team.fill(self._module, lambda pieces: stage.fill(pieces, self.writer.group), stage.seed)
        else:
            self._module.to(self.root_device)
            self.team.align(self._module)
        self._shares = None

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        parts = {id(share.part) for share in self.shares.shares}
        stepped = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        if any(id(parameter) not in parts for parameter in stepped):  # a user's own optimizer, over whole parameters
            self._shares = self.team.shares(self._module, False)

    @property
    def shares(self) -> Shares:
        """What of each parameter this rank steps."""
        if self._shares is None:
            stage: Any = self.lightning_module
            self._shares = self.team.shares(self._module, self.zero and stage.optim.by_element)
        return self._shares

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """For the optimizer: a parameter, or this rank's rows of it."""
        return self.shares.named_parameters()

    def barrier(self, name: str | None = None) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world_size == 1 or not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    # -- the step -----------------------------------------------------------------------------------------------

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            stage: Any = self.lightning_module
            self._executor = self.executor_of(stage.phases())
        return self._executor

    def executor_of(self, phases: Sequence[Any]) -> Executor:
        """Runs these phases, of a model that lies on the ranks as the stage's own does."""
        return self.team.executor(
            self._module, phases, self.num_chunks, recomputed(self.recompute, self.ep > 1), self.overlap
        )

    def forward_backward(self, micros: Sequence[MicroBatch], head_loss: HeadLoss) -> StepResult:
        """Loss and gradients of the global batch, of which ``micros`` are this rank's part; equal on all ranks."""
        batch = self.sums.batch(micros, preempt.requested())
        self.stopping = batch.stop
        if hasattr(self._module, "attach"):
            self._module.attach()

        def attempt() -> StepResult:
            # gradients and losses are averaged over the global batch's ranks below, hence the division here
            return self.executor.forward_backward(micros, head_loss, total_targets=batch.targets / self.dp)

        dispatchers, retries, late = self.team.dispatchers, None, None
        if dispatchers is None:
            result = attempt()
        else:
            result, retries = dispatchers.train(attempt, self.clear_gradients, batch.longest)
            late = dispatchers.late()
        result.tokens = batch.tokens
        self.sums.result(result)
        if retries is not None:
            result.metrics["dispatch/retries"] = torch.tensor(float(retries))
        self.shares.reduce()
        result.grad_norm, finite = self.sums.norm(self.shares.squares_count_once())
        result.finite = finite & torch.isfinite(result.loss)
        if late is not None:
            result.finite &= ~late
        self.step_result, self._scale = result, None
        return result

    def clear_gradients(self) -> None:
        self.shares.clear()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.clear_gradients()
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Only the hooks: the executor ran backward in training_step."""
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the closure, clip, then step unless the loss or the gradient is not finite."""
        module = model or self.lightning_module
        assert isinstance(module, LightningModule)
        loss = closure()
        self.precision_plugin._after_closure(module, optimizer)
        self.step(optimizer, **kwargs)
        return loss

    def clip_gradients(self, max_norm: float) -> None:
        """Let the next `step` scale gradients so that the norm found by `forward_backward` is at most ``max_norm``."""
        assert self.step_result is not None and self.step_result.grad_norm is not None
        self._scale = (max_norm / (self.step_result.grad_norm + 1e-6)).clamp(max=1.0)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        """Clip and step, unless the loss or the gradient is not finite.

        On a GPU our own optimizers do all of this there, in one pass over the gradients, which keep their values;
        others make the host wait for the answer.
        """
        scale, self._scale = self._scale, None
        finite = None if self.step_result is None else self.step_result.finite
        if finite is not None and finite.is_cuda and isinstance(optimizer, AdamW):
            optimizer.step(scale=scale, finite=finite, **kwargs)
            self.shares.gather()
            return
        if scale is not None:
            torch._foreach_mul_(self.shares.grads(), scale)
        if finite is None or finite:
            optimizer.step(**kwargs)
            if not isinstance(optimizer, AdamW):  # torch's fused ones write parameters behind autograd's back
                params = [param for group in optimizer.param_groups for param in group["params"]]
                torch.autograd.graph.increment_version(params)
            self.shares.gather()

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        """The model of the stage: what is trained and saved under global names."""
        assert self.lightning_module is not None
        return self.lightning_module.model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.team.pieces(self._module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state under parameter names instead of numbers."""
        shares: dict[Any, Share] = {share.part: share for share in self.shares.shares}
        return {
            "state": {shares[p].name: self.team.state_of(shares[p], state) for p, state in optimizer.state.items()},
            "param_groups": [
                {key: value for key, value in group.items() if key not in ("params", "param_names")}
                for group in optimizer.param_groups
            ],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Back by name, each tensor in the dtype it was saved in: `Optimizer.load_state_dict` would widen BF16 moments."""
        parameters = dict(self.named_parameters())
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.state.clear()
            for name, state in saved["state"].items():
                if name not in parameters:  # of another rank's part
                    continue
                parameter = parameters[name]
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
            for group, stored in zip(optimizer.param_groups, saved["param_groups"]):
                group.update({key: value for key, value in stored.items() if key != "params"})

    @property
    def writer(self) -> CheckpointWriter:
        """Made by the first who asks, on all ranks alike; its group is its own, for its thread's collectives."""
        if self._writer is None:
            group = dist.new_group(backend="gloo", timeout=self.timeout) if self.world_size > 1 else None
            self._writer = CheckpointWriter(self.checkpoint_async, group)
        return self._writer

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        stage: Any = self.lightning_module
        state = checkpoint | {"random": self.sums.objects(storage.random_state())}
        self.writer.save(Path(filepath), state, **stage.checkpoint_files())

    def finish_checkpoint(self) -> None:
        """Return when the last checkpoint is on the disk. Raises its error, on every rank the same."""
        self.writer.finish()

    def teardown(self) -> None:
        failed, writer, self._writer = sys.exception() is not None, self._writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception as error:
            if not failed:
                raise
            warnings.warn(f"{error}", stacklevel=2)  # what ended the training is the error to be read
        stage = self._lightning_module
        if stage is not None and any(parameter.is_meta for parameter in stage.parameters()):
            self._lightning_module = None  # refused before it got memory: Lightning cannot move it, and would hide why
        super().teardown()
        self._lightning_module = stage

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        check_same_model(self._module.cfg, resolve_checkpoint(checkpoint_path))
        wanted = self.team.wanted({share.name: share for share in self.shares.shares})
        state = storage.load(Path(checkpoint_path), wanted=wanted, group=self.writer.group)
        states = state.pop("random", [])
        if self.global_rank < len(states):
            # set when training starts: building the optimizer and the data loader may still draw
            self._random = states[self.global_rank]
        return state

    def on_train_start(self) -> None:
        state, self._random = self._random, None
        if state is not None:
            storage.set_random_state(state)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        self.writer.finish()  # what is to replace it must be there first
        if self.is_global_zero:
            storage.remove(Path(filepath))

    _random: dict[str, Any] | None = None


def recomputed(names: Sequence[str], exchanged: bool = False) -> Callable[[str], bool]:
    """Whether a phase runs again in backward, by its name: "layers.3.attend" is named by "attend" and by "all".

    ``exchanged``: not so one that talks to other ranks, which "all" leaves out then.
    """
    return lambda name: ("all" in names or name.rpartition(".")[2] in names) and not (exchanged and talks(name))
