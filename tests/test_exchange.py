"""The branch on shards: the fast way and the plain formula agree; ranks that differ are told."""

import itertools

import pytest
import torch
import torch.distributed as dist

from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import ComputePath
from bridge.peft.parallel import exchange as module
from bridge.peft.parallel.agreement import check_alike
from bridge.peft.parallel.exchange import Exchange, exchanged_lora_add
from bridge.peft.parallel.grad_norm import clip_grad_norm_
from bridge.peft.parallel.megatron import LinearLayout
from bridge.peft.parallel.shard import Shard
from tests.helpers.ranks import on_ranks

TOKENS, IN, OUT, DIM = 6, 10, 8, 3


def layouts():
    for column, how in itertools.product((True, False), ("whole", "sequence", "expert")):
        yield LinearLayout(
            group=dist.group.WORLD,
            is_column=column,
            sequence_parallel=how == "sequence",
            is_expert=how == "expert",
            blocks=1,
        )


def result_and_gradients(layout, dropout, position, dtype, frozen=False):
    """y and all gradients on this rank, from whole values that are alike on both."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    whole = {
        "x": torch.randn(TOKENS, 2, IN, dtype=dtype),
        "a": torch.randn(DIM, IN),
        "b": torch.randn(OUT, DIM),
        "y": torch.randn(TOKENS, 2, OUT, dtype=dtype),
    }
    split = layout.sequence_parallel
    tokens = Shard(dist.group.WORLD, 0)
    x, y = whole["x"], whole["y"]
    if layout.is_column:
        x, y = tokens.cut(x) if split else x, y.chunk(2, -1)[rank]
    else:
        x, y = x.chunk(2, -1)[rank], tokens.cut(y) if split else y
    parts = [x, layout.a.cut(whole["a"]), layout.b.cut(whole["b"]), y]
    x, a, b, y = (t.clone().requires_grad_() for t in parts)
    b.requires_grad_(not frozen)
    scale, exchange = 0.5, layout.exchange
    out = exchanged_lora_add(y, x, a, b, scale, exchange, dropout, position)
    out.float().pow(2).sum().backward()
    return [out, x.grad, a.grad, y.grad, *([] if frozen else [b.grad])]


def compare_the_two_ways():
    cases = [("pre", 0.0), ("pre", 0.5), ("post", 0.5)]
    for layout, (position, p) in itertools.product(layouts(), cases):
        for dtype in (torch.float32, torch.bfloat16):
            fast = result_and_gradients(layout, p, position, dtype)
            with pytest.MonkeyPatch.context() as patch:
                plain = ComputePath("reference", "")
                patch.setattr(module, "choose_path", lambda *a, path=plain, **k: path)
                expected = result_and_gradients(layout, p, position, dtype)
            close = (
                {"rtol": 1e-5, "atol": 1e-5}
                if dtype == torch.float32
                else {"rtol": 0.05, "atol": 0.3}
            )
            torch.testing.assert_close(fast, expected, **close)
        # a frozen B takes the plain formula, with the same masks
        frozen = result_and_gradients(layout, p, position, torch.float32, frozen=True)
        whole = result_and_gradients(layout, p, position, torch.float32)
        torch.testing.assert_close(frozen, whole[:4], rtol=1e-5, atol=1e-5)
    count_what_travels()
    tell_ranks_that_differ()
    clip_as_torch_does_the_whole()


#: What travels in a forward and a backward: the collective, and how many numbers a rank gives.
_H, _HALF = TOKENS * 2 * DIM, TOKENS * DIM
_A, _B = DIM * IN, OUT * DIM
TRAVELS = {
    (True, "whole"): [("all_reduce", _H)],
    (True, "sequence"): [
        ("all_gather_into_tensor", _HALF),
        ("reduce_scatter_tensor", _H),
        ("all_reduce", _A),
    ],
    (True, "expert"): [("all_reduce", _A)],
    (False, "whole"): [("all_reduce", _H)],
    (False, "sequence"): [
        ("reduce_scatter_tensor", _H),
        ("all_gather_into_tensor", _HALF),
        ("all_reduce", _B),
    ],
    (False, "expert"): [("all_reduce", _B)],
}


def count_what_travels():
    for layout, expected in zip(layouts(), TRAVELS.values(), strict=True):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
                original = getattr(dist, name)

                def counted(*args, name=name, original=original, seen=seen, **kwargs):
                    given = args[0] if name == "all_reduce" else args[1]
                    seen.append((name, given.numel()))
                    return original(*args, **kwargs)

                patch.setattr(dist, name, counted)
            result_and_gradients(layout, 0.0, "pre", torch.float32)
        assert seen == expected, (layout.is_column, seen)


def tell_ranks_that_differ():
    check_alike(1, "a number", "", dist.group.WORLD)
    with pytest.raises(AdapterError, match=r"differ in a number: 0 on the first, 1 on number 1; x"):
        check_alike(dist.get_rank(), "a number", "x", dist.group.WORLD)


def clip_as_torch_does_the_whole():
    whole, split = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))
    whole.grad, split.grad = torch.full((3,), 2.0), torch.arange(4.0)
    expected = torch.cat([whole.grad, split.grad, split.grad]).norm()
    split.tensor_model_parallel = True
    norm = clip_grad_norm_([whole, split], 1.0, dist.group.WORLD)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(whole.grad, torch.full((3,), 2.0) / expected)


@pytest.mark.distributed
def test_the_fast_way_and_the_plain_formula_agree_on_every_layout(tmp_path):
    on_ranks(2, compare_the_two_ways, tmp_path)


def test_on_one_rank_nothing_is_exchanged():
    t = torch.ones(2, 3)
    for way in ("keep", "sum", "gather", "scatter"):
        assert Exchange().moved(t, way) is t
    check_alike(1, "a number", "", None)


def test_a_shard_of_two_blocks_is_cut_from_each_and_joined_in_their_order():
    class Group:
        def __init__(self, rank):
            self._rank = rank

        def size(self):
            return 2

        def rank(self):
            return self._rank

    whole = torch.arange(8.0).view(8, 1)
    parts = [Shard(Group(rank), 0, 2).cut(whole).flatten().tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert Shard(Group(0), 0, 2).shape((4, 1)) == (8, 1)
    assert Shard(Group(0), 1).shape((4, 1)) == (4, 2)
    assert Shard(Group(0)).shape((4, 1)) == (4, 1)
