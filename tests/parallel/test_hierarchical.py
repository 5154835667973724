"""Rows between nodes: each crosses once, as counted on 2 x 2 ranks and by the pure function on a layout of 8 nodes."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from litseek_kernels.ref.gate import choose_experts
from torch import Tensor

from litseek.parallel.hierarchical import HierarchicalDispatcher, NodeGroups, node_groups, rows_between_nodes
from litseek.parallel.strategy import LitseekStrategy
from tests.parallel.layouts import train_here
from tests.parallel.test_layouts import same
from tests.ranks import KEPT, ranks

D = 16


def choices(tokens: int, experts: int, top_k: int, nodes: int, limit: int, seed: int) -> Tensor:
    """A gate's choice of random scores, at most ``limit`` of the nodes (groups) a token; biases are not zero."""
    g = torch.Generator().manual_seed(seed)
    bias = 0.01 * torch.randn(experts, generator=torch.Generator().manual_seed(1))
    return choose_experts(
        torch.randn(tokens, experts, generator=g).sigmoid(), bias, top_k, nodes, limit, top_k // limit
    )


@cache
def groups() -> NodeGroups:
    made = node_groups([[0, 1, 2, 3]], 2)
    KEPT.extend(made)
    return made


def crossing(limit: int) -> int:
    """Bytes that this rank sends to the other node in a dispatch."""
    dispatcher = HierarchicalDispatcher(8, groups())
    expert = choices(50, 8, 4, 2, limit, seed=dist.get_rank())
    dispatcher.dispatch(torch.randn(50, D), expert, torch.rand(50, 4))
    return dispatcher.bytes_between_nodes()


@pytest.mark.parametrize("limit", [1, 2])
def test_each_row_crosses_once_and_its_bytes_are_counted(limit):
    for rank, sent in enumerate(ranks(4).run(crossing, limit)):
        rows = rows_between_nodes(choices(50, 8, 4, 2, limit, seed=rank), 8, nodes=2, home=rank // 2)
        assert sent == rows * 4 * (D + 4)  # the row in FP32 and its four places
        assert rows <= 50 if limit == 2 else rows < 35


def test_node_limited_routing_saves_traffic_between_8_nodes():
    """256 experts, top 8: at most 4 nodes a token (report §2.1.2, §3.2.2) against any. Mean over tokens of all nodes."""
    tokens, found = 20_000, {}
    for limit in (4, 8):
        expert = choices(tokens, 256, 8, 8, limit, seed=0)
        node_TN = torch.stack([(expert // 32 == n).any(1) for n in range(8)], dim=1)
        assert node_TN.sum(1).max() <= limit
        rows = sum(rows_between_nodes(expert, 256, nodes=8, home=n) for n in range(8))
        assert rows == 7 * node_TN.sum()  # each node that a token needs is another one for 7 of 8 homes
        found[limit] = rows / (8 * tokens)
    # 7 rows a token were each chosen expert to get its own. In FP8, 7168 codes and 56 scales a row: 25.6 and 34.2 KB
    assert found == pytest.approx({4: 3.47, 8: 4.63}, abs=0.02)


def uneven() -> None:
    node_groups([[0, 1, 2, 3]], 3)


def test_nodes_that_do_not_divide_are_refused():
    with pytest.raises(RuntimeError, match="group of 4 ranks is not a multiple of 3 on a node"):
        ranks(4).run(uneven)


def trained(folder: Path) -> dict[str, Any]:
    """Two steps on four ranks that pass for two nodes of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitseekStrategy, "ranks_per_node", 2)
        return train_here(folder, dict(ep=4, dispatcher="hierarchical", overlap=True), steps=2)


def test_training_over_nodes_equals_one_process(tmp_path):
    same(ranks(4).run(trained, tmp_path / "four"), train_here(tmp_path / "one", {}, steps=2))
