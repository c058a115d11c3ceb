"""`W + s L R` that is never added up: every product against the dense sum, in float64 and below."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bridge.peft.errors import AdapterError
from bridge.peft.ops.grouped import lora_grouped, lora_grouped_reference
from bridge.peft.ops.low_rank_weight import How, LowRankWeight

EXPERTS, ROWS, COLUMNS, DIM, SCALE = 3, 8, 16, 4, 1.5
ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)


def weight(dtype=torch.float32, dropout=0.0, position="pre", grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((EXPERTS, ROWS, COLUMNS), (EXPERTS, ROWS, DIM), (EXPERTS, DIM, COLUMNS))
    base, left, right = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    how = How("experts.stack", SCALE, dropout, position)
    return LowRankWeight(base, left.requires_grad_(grad), right.requires_grad_(grad), how)


def dense(w):
    return w.base + w.how.scale * w.left @ w.right


def rows(count, dtype=torch.float32, *, width=COLUMNS):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=generator).to(dtype).requires_grad_()


def loop(x, stack, offs):
    """A grouped product as the formula says it: (experts, in, out)."""
    starts = [0, *offs.tolist()]
    pairs = itertools.pairwise(starts)
    return torch.cat([x[i:j] @ stack[e] for e, (i, j) in enumerate(pairs)])


USES = {
    "linear": lambda x, w: F.linear(x, w[1]),
    "linear with bias": lambda x, w: F.linear(x, w[1], torch.ones(ROWS, dtype=x.dtype)),
    "by a tensor's number": lambda x, w: F.linear(x, w[torch.tensor(1)]),
    "matmul": lambda x, w: x @ w[1].T,
    "matmul by name": lambda x, w: torch.matmul(x, w[1].t()),
    "mm": lambda x, w: torch.mm(x, w.mT[1]),
    "in turn": lambda x, w: sum(F.linear(x, one) for one in w),
    "cast": lambda x, w: F.linear(x, w[1].to(x.dtype)),
    "some of the stack": lambda x, w: F.linear(x, w[1:][0]),
    "bmm": lambda x, w: torch.bmm(x.expand(EXPERTS, *x.shape), w.transpose(1, 2)),
    "permuted": lambda x, w: torch.matmul(x.expand(EXPERTS, *x.shape), w.permute(0, 2, 1)),
    "weight on the left": lambda x, w: torch.bmm(w, x.T.expand(EXPERTS, COLUMNS, len(x))),
    "chosen, on the left": lambda x, w: torch.bmm(
        w[torch.tensor([0, 2, 2, 1, 0, 1, 2])], x.unsqueeze(-1)
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_product_and_its_gradients_are_those_of_the_dense_sum(use):
    w, x = weight(torch.float64), rows(7, torch.float64)
    own = (x, w.left, w.right)
    got, expected = use(x, w), use(x, dense(w))
    torch.testing.assert_close(got, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, own, direction), torch.autograd.grad(expected, own, direction)
    )


@pytest.mark.parametrize("product", [F.grouped_mm, torch._grouped_mm])
def test_a_grouped_product_and_its_gradients_are_those_of_the_dense_sum(product):
    w, x = weight(), rows(7)
    got, expected = product(x, w.mT, offs=ENDS), loop(x, dense(w).mT, ENDS)
    torch.testing.assert_close(got, expected)
    own, direction = (x, w.left, w.right), torch.randn(7, ROWS)
    for mine, want in zip(
        torch.autograd.grad(got, own, direction),
        torch.autograd.grad(expected, own, direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["both", "left", "right", "none"])
def test_grouped_fast_and_reference_agree_whatever_is_trained(trained):
    w, x = weight().mT, rows(7)
    w.left, w.right = w.left.detach().clone(), w.right.detach().clone()
    w.left.requires_grad_(trained in ("both", "left"))
    w.right.requires_grad_(trained in ("both", "right"))
    own = [x, *(t for t in (w.left, w.right) if t.requires_grad)]
    fast = lora_grouped(F.grouped_mm, x, w.base, w.left, w.right, ENDS, SCALE)
    slow = lora_grouped_reference(F.grouped_mm, x, w.base, ENDS, w.left, w.right, SCALE)
    torch.testing.assert_close(fast, slow)
    direction = torch.randn(7, ROWS)  # torch's own grouped product takes no expanded gradient
    for mine, want in zip(
        torch.autograd.grad(fast, own, direction),
        torch.autograd.grad(slow, own, direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_a_rank_that_grouped_kernels_do_not_take_is_padded():
    w, x = weight().mT, rows(7)
    left, right = w.left[..., :3], w.right[:, :3]
    got = lora_grouped_reference(F.grouped_mm, x, w.base, ENDS, left, right, SCALE)
    torch.testing.assert_close(got, loop(x, w.base + SCALE * left @ right, ENDS))


def test_with_l_or_r_at_zero_every_product_is_the_bases_bit_for_bit():
    w, x = weight(), rows(7)
    with torch.no_grad():
        w.left.zero_()
    for name, use in USES.items():
        assert torch.equal(use(x, w), use(x, w.base)), name
    assert torch.equal(F.grouped_mm(x, w.mT, offs=ENDS), F.grouped_mm(x, w.base.mT, offs=ENDS))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("use", ["linear", "bmm", "weight on the left", "grouped"])
def test_dropout_leaves_the_mean_of_the_branch(use, position):
    w, x = weight(dropout=0.3, position=position, grad=False), rows(7).detach()
    with torch.no_grad():
        if use == "grouped":
            draw, expected = (lambda: F.grouped_mm(x, w.mT, offs=ENDS)), loop(x, dense(w).mT, ENDS)
        else:
            draw, expected = (lambda: USES[use](x, w)), USES[use](x, dense(w))
        torch.manual_seed(0)
        draws = torch.stack([draw() for _ in range(2000)])
    error = (draws.mean(0) - expected).abs()
    assert (error < 5 * draws.std(0) / 2000**0.5 + 1e-4).all()
    assert draws.std(0).amax() > 0.1, "nothing was dropped"


def test_grouped_dropout_has_the_gradient_of_its_own_mask():
    w, x = weight(dropout=0.3), rows(7)

    def out(left, right, x):
        torch.manual_seed(3)
        stack = LowRankWeight(w.base, left, right, w.how)
        return F.grouped_mm(x, stack.mT, offs=ENDS)

    step = 1e-2
    direction = torch.randn(7, ROWS, generator=torch.Generator().manual_seed(2))
    for place, tensor in enumerate((w.left, w.right, x)):
        (gradient,) = torch.autograd.grad((out(w.left, w.right, x) * direction).sum(), tensor)
        change = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4))
        values = []
        for sign in (1, -1):
            moved = [w.left, w.right, x]
            moved[place] = tensor.detach() + sign * step * change
            with torch.no_grad():
                values.append((out(*moved).double() * direction).sum())
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * change).sum().double(), slope, rtol=1e-2, atol=1e-2)


def test_what_is_asked_of_a_weight_is_the_bases():
    w = weight(torch.bfloat16)
    assert (w.shape, w.dtype, w.device.type) == ((EXPERTS, ROWS, COLUMNS), torch.bfloat16, "cpu")
    assert len(w) == EXPERTS and w.size(1) == ROWS and w.dim() == w.ndim == 3
    assert w.float().dtype == torch.float32 and w.float().left.dtype == torch.bfloat16
    assert not hasattr(w, "ds_id")


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.einsum("ni,eoi->eno", x, w),
        lambda x, w: w.sum(0),
        lambda x, w: w.data,
        lambda x, w: w.data_ptr(),
        lambda x, w: x @ w,
        lambda x, w: torch.cat([w, w]),
        lambda x, w: F.linear(x, w[0, 1]),
        lambda x, w: w.transpose(0, 1),
        lambda x, w: w.permute(1, 0, 2),
        lambda x, w: F.grouped_mm(x, w.mT),
    ],
)
def test_any_other_use_is_refused_by_name(use):
    with pytest.raises(AdapterError, match="experts.stack is adapted, and its module uses it in"):
        use(rows(7), weight())
