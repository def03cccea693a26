import pytest
import torch

from compress.calib.products import Products, products_of


def bunches(n, width=70, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(40, width, generator=generator).to(dtype) for _ in range(n)]
    return [(x, (x + 0.1 * torch.randn(40, width, generator=generator)).to(dtype)) for x in xs]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("panel", [16, 70, 512])
def test_panels_come_to_the_sums_of_all_tokens(n, panel, monkeypatch):
    monkeypatch.setattr("compress.calib.products.PANEL", panel)
    products, seen = Products(), bunches(n)
    for x, dense in seen:
        products.add(x, dense)
    hessian, drift, moved = products.finish()
    x, y = (torch.cat(each).double() for each in zip(*seen, strict=True))
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(drift.double(), (y - x).T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moved.double(), (y - x).sum(0), rtol=1e-4, atol=1e-4)
    assert products.finish() == (None, None, None), "the sums are used up"


def test_half_of_a_symmetric_sum_is_kept_and_the_first_product_in_float32(monkeypatch):
    monkeypatch.setattr("compress.calib.products.PANEL", 8)
    products, seen = Products(), bunches(2, 64)
    numbers = 64 * 64 // 2 + 8 * 64 // 2  # up to the diagonal, whole panels
    products.add(*seen[0])
    made = products.made()
    assert sum(panel.nbytes for key, panel in made.items() if key.startswith("squares")) == 4 * numbers
    products.add(*seen[1])
    made = products.made()
    assert sum(panel.nbytes for key, panel in made.items() if key.startswith("squares")) == 8 * numbers
    assert sum(panel.nbytes for key, panel in made.items() if key.startswith("crossed")) == 8 * 64 * 64


def test_without_a_dense_model_there_is_no_drift():
    products = Products()
    products.add(bunches(1)[0][0], None)
    hessian, *drift = products.finish()
    assert hessian is not None and drift == [None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_as_exact_as_float32(dtype):
    x = torch.randn(300, 80, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    exact = x.double().T @ x.double()
    with products_of(dtype):
        product = x.T @ x
    assert (product - exact).abs().max() < 1e-6 * exact.abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # left as it was
