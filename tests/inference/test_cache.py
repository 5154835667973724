"""The latent cache: what it holds, what it shows, what compaction keeps."""

from __future__ import annotations

import torch

from litseek.inference.cache import LatentCache
from litseek.models.config import DeepSeekV3Config


def test_holds_576_numbers_a_token_a_layer_in_v3():
    cache = LatentCache(DeepSeekV3Config(), batch=2, max_len=3, device="meta")
    assert cache.numbers_per_token() == 512 + 64
    assert cache.c_kv_LBTR.numel() + cache.k_rope_LBTr.numel() == 61 * 2 * 3 * 576


def test_slot_is_position_and_later_writes_replace_padding():
    cfg = DeepSeekV3Config(num_hidden_layers=2, first_k_dense_replace=1, kv_lora_rank=3, qk_rope_head_dim=2)
    cache = LatentCache(cfg, batch=2, max_len=4)
    layer = cache.layer(1)
    layer.write(torch.arange(3).expand(2, -1), torch.ones(2, 3, 3), torch.ones(2, 3, 2))
    layer.write(torch.tensor([[3], [1]]), torch.full((2, 1, 3), 7.0), torch.full((2, 1, 2), 7.0))
    c_kv, k_rope = layer.read(4)
    assert c_kv[:, :, 0].tolist() == [[1, 1, 1, 7], [1, 7, 1, 0]]
    assert k_rope[:, :, 0].tolist() == [[1, 1, 1, 7], [1, 7, 1, 0]]
    assert not cache.layer(0).read(4)[0].any()


def test_keep_moves_rows_without_new_memory():
    cfg = DeepSeekV3Config(num_hidden_layers=1, first_k_dense_replace=1, kv_lora_rank=3, qk_rope_head_dim=2)
    cache = LatentCache(cfg, batch=4, max_len=2)
    rows = torch.arange(4.0)[:, None, None]
    cache.layer(0).write(torch.zeros(4, 1, dtype=torch.int64), rows.expand(4, 1, 3), rows.expand(4, 1, 2))
    cache.length, before = 1, cache.c_kv_LBTR.data_ptr()
    cache.keep(torch.tensor([1, 3]))
    assert cache.batch == 2 and cache.c_kv_LBTR.data_ptr() == before
    assert cache.layer(0).read(1)[0][:, 0, 0].tolist() == [1, 3]
