"""Products by oneDNN against torch's own, their gradients, and what happens where oneDNN is missing or wrong."""

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import products
from palm_rlhf_pytorch.products import linear, onednn_works, pack

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def always_large(monkeypatch):
    """Every product counts as large, on a processor that MKL is slow on: small ones show what large ones do there."""
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


@pytest.fixture
def half_is_slow(monkeypatch):
    """A processor without instructions for half precision: weights for three rows or more are kept in float32."""
    monkeypatch.setattr(products, "float32_rows", lambda dtype: 3 if dtype in HALVES else None)


@pytest.fixture
def fresh_probe():
    onednn_works.cache_clear()
    yield
    onednn_works.cache_clear()


def by_hand(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.double()[..., None, :] * weight.double()).sum(dim=-1)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 1, 5)])
def test_linear_and_its_gradients_equal_products_by_hand(always_large, shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 7)
    out = linear(x, weight)
    out.backward(upstream)
    torch.testing.assert_close(out.double(), by_hand(x, weight), atol=1e-5, rtol=0)
    expected = by_hand(upstream, weight.T.contiguous())
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-5, rtol=0)
    rows = torch.einsum("rk,rd->kd", upstream.reshape(-1, 7).double(), x.detach().reshape(-1, 5).double())
    torch.testing.assert_close(weight.grad.double(), rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_linear_gives_no_gradient_to_what_is_frozen(always_large, frozen):
    x, weight = torch.randn(3, 5, requires_grad=frozen != "x"), torch.randn(7, 5, requires_grad=frozen != "weight")
    linear(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_linear_can_be_differentiated_twice(always_large):
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)

    def second(product):
        first = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for found, expected in zip(second(linear), second(lambda x, weight: x @ weight.T), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-5)


def rounded_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a sum without error becomes in a format: the nearest number of it."""
    return exact.detach().to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_slow_half_precision_goes_through_float32_and_is_rounded_once(half_is_slow, dtype, shape):
    x, weight = (torch.randn(size).to(dtype).requires_grad_() for size in (shape, (7, 5)))
    upstream = torch.randn(*shape[:-1], 7).to(dtype)
    out = linear(x, weight)
    out.backward(upstream)
    assert torch.equal(out, rounded_once(by_hand(x, weight), dtype))
    assert torch.equal(x.grad, rounded_once(by_hand(upstream, weight.detach().T), dtype))
    rows = torch.einsum("rk,rd->kd", upstream.reshape(-1, 7).double(), x.detach().reshape(-1, 5).double())
    assert torch.equal(weight.grad, rounded_once(rows, dtype))


def test_slow_half_precision_under_autocast_rounds_what_goes_in_and_leaves_gradients_wide(half_is_slow):
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, weight)
        out.sum().backward()  # autocast is on in the backward pass as well
    narrow_x, narrow_weight = x.detach().bfloat16(), weight.detach().bfloat16()
    assert torch.equal(out, rounded_once(by_hand(narrow_x, narrow_weight), torch.bfloat16))
    assert torch.equal(x.grad, rounded_once(narrow_weight.double().sum(dim=0).expand(3, 5), torch.bfloat16).float())
    torch.testing.assert_close(weight.grad.double(), narrow_x.double().sum(dim=0).expand(7, 5), atol=1e-6, rtol=0)


def test_slow_half_precision_can_be_differentiated_twice(half_is_slow):
    x, weight = (torch.randn(size).bfloat16().requires_grad_() for size in ((3, 5), (7, 5)))
    first = torch.autograd.grad(linear(x, weight).float().square().sum(), x, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.float().sum(), x)
    exact = 2 * (weight.double().T @ weight.double()).sum(dim=0).expand(3, 5)  # of |x W^T|^2: 2 W^T W
    torch.testing.assert_close(second.double(), exact, atol=0.3, rtol=0.02)


def test_slow_half_precision_can_be_mapped_over(half_is_slow):
    x, weight = torch.randn(4, 3, 5).bfloat16(), torch.randn(7, 5).bfloat16()
    found = torch.func.vmap(lambda rows: linear(rows, weight))(x)
    assert torch.equal(found, rounded_once(by_hand(x, weight), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_transposed_products(half_is_slow, dtype):
    x, y = torch.randn(3, 7).to(dtype), torch.randn(3, 5).to(dtype)
    exact = torch.einsum("mk,md->kd", x.double(), y.double())
    torch.testing.assert_close(products.transposed(x, y).double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_slow_half_precision_gives_no_gradient_to_what_is_frozen(half_is_slow, frozen):
    x, weight = (torch.randn(size).bfloat16() for size in ((3, 5), (7, 5)))
    (weight if frozen == "x" else x).requires_grad_()
    linear(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_slow_half_precision_rounds_a_row_alike_however_many_there_are(half_is_slow):
    x, weight = torch.randn(130, 64).bfloat16(), torch.randn(37, 64).bfloat16()
    whole = linear(x, weight)
    for rows in (1, 2, 3, 129):
        assert torch.equal(linear(x[:rows], weight), whole[:rows])


def test_half_precision_keeps_torchs_route_where_dtypes_differ(half_is_slow, monkeypatch):
    monkeypatch.setattr(products._HalfProduct, "apply", lambda *given: pytest.fail("that is not half precision"))
    x, weight = torch.randn(4, 5), torch.randn(7, 5)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.half(), weight.bfloat16())


@pytest.mark.parametrize("dtype", HALVES)
def test_packed_half_precision_is_kept_in_float32_where_that_is_faster(half_is_slow, dtype):
    x, weight, onto = (torch.randn(size).to(dtype) for size in ((3, 19), (33, 19), (3, 33)))
    exact = by_hand(x, weight)
    torch.testing.assert_close(pack(weight, rows=3)(x), rounded_once(exact, dtype), atol=0, rtol=0.01)
    found = pack(weight, rows=3)(x, onto=onto)
    torch.testing.assert_close(found, rounded_once(exact + onto.double(), dtype), atol=1e-3, rtol=0.01)


def test_linear_follows_autocast(always_large):
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("slow", [True, False])
def test_only_large_float32_products_leave_torchs_own_route_and_only_where_mkl_is_slow(monkeypatch, slow):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: slow)
    taken = []
    monkeypatch.setattr(products._Float32Product, "apply", lambda x, weight: taken.append(x.shape) or x @ weight.T)
    for rows, dtype in ((2**17, torch.float32), (2**16 - 1, torch.float32), (2**17, torch.float64)):
        linear(torch.ones(rows, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype))
    assert taken == ([(2**17, 32)] if slow and onednn_works(torch.float32) else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, None])
def test_packed_weights_give_the_product(dtype, rows):
    x, weight = torch.randn(3, 19).to(dtype), torch.randn(33, 19).to(dtype)
    kept = weight.clone()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(pack(weight, rows=rows)(x).double(), by_hand(x, weight), atol=tolerance, rtol=0)
    onto = torch.randn(3, 33).to(dtype)
    found = pack(weight, rows=rows)(x, onto=onto.clone())
    torch.testing.assert_close(found.double(), by_hand(x, weight) + onto.double(), atol=tolerance, rtol=0)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    ("slow", "rows", "dtype", "copied"),
    [(True, 1, torch.float32, True), (False, 2, torch.float32, False), (False, 3, torch.float32, True),
     (False, 1, torch.bfloat16, True), (True, None, torch.float32, False), (True, 1, torch.float64, False)],
)  # fmt: skip
def test_weights_are_copied_where_that_pays(monkeypatch, slow, rows, dtype, copied):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: slow)
    weight = torch.randn(33, 19).to(dtype)
    product = pack(weight, rows=rows)
    x = torch.randn(3, 19).to(dtype)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before) == (copied and onednn_works(dtype))


@pytest.mark.parametrize("fault", ["missing", "wrong", "refused"])
def test_without_a_working_onednn_everything_goes_by_torchs_own_route(monkeypatch, always_large, fresh_probe, fault):
    def broken(*_, **__):
        raise RuntimeError("could not create a primitive")

    if fault == "missing":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif fault == "wrong":
        right = products._onednn
        monkeypatch.setattr(products, "_onednn", lambda x, **given: right(x, **given) * 1.01)
    else:
        monkeypatch.setattr(products, "_onednn", broken)
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    assert not onednn_works(torch.float32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.no_grad():
        assert torch.equal(pack(weight, rows=3)(x), F.linear(x, weight))


def test_probing_leaves_random_state_and_settings_alone(fresh_probe):
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    onednn_works(torch.float32)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_float32_matmul_precision() == precision


def test_probing_is_done_on_the_cpu_whatever_the_default_device(fresh_probe):
    expected = onednn_works(torch.float32)
    onednn_works.cache_clear()
    with torch.device("meta"):
        assert onednn_works(torch.float32) == expected
