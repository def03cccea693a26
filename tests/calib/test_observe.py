import pytest
import torch
from tiny import save_tiny

from compress.calib.hidden import HiddenStates, Sequences
from compress.calib.model import Model
from compress.calib.observe import observe, shared_inputs, stages
from compress.calib.stats import LayerStats, inverse_factor, make_up
from compress.calib.weight_files import WeightFiles
from compress.errors import RunError

NEEDS = frozenset({"x_sq", "hessian"})


def block_and_hidden(folder, n=3):
    model = Model(folder, WeightFiles(folder))
    generator = torch.Generator().manual_seed(0)
    hidden = [model.embed(torch.randint(3, 200, (24,), generator=generator)) for _ in range(n)]
    return model.load_block(0), hidden


def short(names, block):
    return [name.removeprefix(block.name + ".") for name in names]


def test_layers_that_read_the_same_tensor_share_and_come_in_the_order_of_the_data(llama_folder):
    block, hidden = block_and_hidden(llama_folder)
    order = [short([x.name for x in stage], block) for stage in stages(block, shared_inputs(block, hidden[0]))]
    assert order == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_sums_equal_those_of_all_inputs_at_once(llama_folder):
    block, hidden = block_and_hidden(llama_folder)
    shared = shared_inputs(block, hidden[0])
    stats = observe(block, block.layers, Sequences(hidden), NEEDS, shared)
    seen = []
    name = "model.layers.0.mlp.down_proj"
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for sequence in hidden:
        block(sequence)
    handle.remove()
    x = torch.cat(seen)
    assert stats[name].n_tokens == len(x) == 72
    torch.testing.assert_close(stats[name].hessian.double(), x.T @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[name].x_sq.double(), x.square().sum(0), rtol=1e-5, atol=1e-6)
    q, k = (stats[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
    assert q is k


def test_sums_do_not_depend_on_the_order_of_bunches_of_sequences(llama_folder, monkeypatch):
    block, hidden = block_and_hidden(llama_folder, 8)
    monkeypatch.setattr("compress.calib.observe.TOKENS_AT_ONCE", 2 * hidden[0].shape[1])
    shared = shared_inputs(block, hidden[0])
    there = observe(block, block.layers, Sequences(hidden), NEEDS, shared)
    back = observe(block, block.layers, Sequences(hidden[4:] + hidden[:4]), NEEDS, shared)
    for name, stats in there.items():
        assert torch.equal(stats.hessian, back[name].hessian)


def test_the_dense_model_goes_along(llama_folder):
    block, hidden = block_and_hidden(llama_folder, 3)
    shared = shared_inputs(block, hidden[0])
    dense = HiddenStates(hidden[0], 3)
    for index, sequence in enumerate(hidden):
        dense[index] = sequence + 0.1 * torch.randn(sequence.shape, generator=torch.Generator().manual_seed(index))
    before, after = [each.clone() for each in dense], [block(sequence) for sequence in dense]
    first = observe(block, block.layers, Sequences(hidden, dense), NEEDS, shared)[block.layers[0].name]
    assert all(torch.equal(a, b) for a, b in zip(dense, after, strict=True))
    y, x = (torch.cat([block.module.input_layernorm(each)[0] for each in which]).double() for which in (before, hidden))
    assert torch.allclose(first.drift.double(), (y - x).T @ x, atol=1e-3)
    assert torch.allclose(first.drift_sum.double(), (y - x).sum(0), atol=1e-4)


def test_making_up_for_drift_comes_nearest_to_what_the_dense_inputs_gave():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 24, generator=generator), torch.randn(6, 24, generator=generator)
    y = x + 0.3 * torch.randn(400, 24, generator=generator) + 0.2 * x.roll(1, 1)
    stats = LayerStats(400, hessian=x.T @ x, drift=(y - x).T @ x, drift_sum=(y - x).sum(0))
    best = torch.linalg.lstsq(x, y @ weight.T).solution.T
    assert torch.allclose(make_up(stats, weight, 1.0, damping=1e-6), best, atol=1e-3)
    half = make_up(stats, weight, 0.5, damping=1e-6)
    assert torch.allclose(half, (weight + best) / 2, atol=1e-3)
    assert make_up(stats, weight, 0.0) is weight


def test_shifts_and_scales_of_inputs_leave_drift_what_it_would_have_been():
    generator = torch.Generator().manual_seed(0)
    x, shift, scale = torch.randn(90, 8, generator=generator), torch.randn(8, generator=generator), torch.rand(8) + 0.5
    y = x + 0.3 * torch.randn(90, 8, generator=generator)
    stats = LayerStats(90, x_sum=x.sum(0), hessian=x.T @ x, drift=(y - x).T @ x, drift_sum=(y - x).sum(0))
    seen = stats.shifted(shift).divided(scale)
    assert torch.allclose(seen.drift, ((y - x) / scale).T @ ((x - shift) / scale), atol=1e-4)
    assert torch.allclose(seen.drift_sum, ((y - x) / scale).sum(0), atol=1e-4)


def test_each_expert_sees_only_its_own_tokens(tmp_path):
    block, hidden = block_and_hidden(save_tiny(tmp_path, "mixtral"))
    stats = observe(block, block.layers, Sequences(hidden), NEEDS, shared_inputs(block, hidden[0]))
    counts = [stats[f"model.layers.0.mlp.experts.gate_up_proj.{i}"].n_tokens for i in range(4)]
    assert sum(counts) == 2 * 72  # two experts a token
    assert len(set(counts)) > 1
    assert counts == [stats[f"model.layers.0.mlp.experts.down_proj.{i}"].n_tokens for i in range(4)]


def test_an_expert_no_token_reaches_gets_white_noise(tmp_path):
    model = Model(save_tiny(tmp_path, "mixtral", num_local_experts=16), WeightFiles(tmp_path))
    hidden = [model.embed(torch.tensor([5, 5, 5, 5]))]
    block = model.load_block(0)
    stats = observe(block, block.layers, Sequences(hidden), NEEDS, shared_inputs(block, hidden[0]))
    unseen = [s for name, s in stats.items() if "gate_up_proj" in name and s.n_tokens == 0]
    assert unseen
    assert all(torch.equal(s.hessian, torch.eye(64)) for s in unseen)


def hessian_of(x):
    return LayerStats(len(x), hessian=x.T @ x)


@pytest.mark.parametrize("in_features", [16, 256, 600])  # within a panel, one whole, several and a rest
def test_the_factor_is_of_the_damped_inverse(in_features):
    x = torch.randn(2 * in_features, in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = hessian_of(x)
    factor, damping = inverse_factor(stats, 0.05)
    damped = stats.hessian + 0.05 * stats.hessian.diagonal().mean() * torch.eye(in_features, dtype=torch.float64)
    assert damping == 0.05
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-10, atol=1e-14)


def test_one_bad_direction_among_many_raises_the_damping():
    diagonal = torch.ones(600)
    diagonal[3] = -0.02  # the last panel, as columns are taken backwards
    assert inverse_factor(LayerStats(8, hessian=torch.diag(diagonal)), 0.01)[1] == pytest.approx(0.1)


def test_damping_grows_until_the_factorization_succeeds():
    stats = LayerStats(8, hessian=torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.02])))
    assert inverse_factor(stats, 0.01)[1] == pytest.approx(0.1)


def test_a_hopeless_hessian_is_an_error():
    with pytest.raises(RunError, match="not positive definite"):
        inverse_factor(LayerStats(8, hessian=torch.diag(torch.tensor([1.0, -9.0]))), 0.01)
    with pytest.raises(RunError, match="NaN or infinity"):
        inverse_factor(LayerStats(8, hessian=torch.diag(torch.tensor([1.0, float("nan")]))), 0.01)


def test_dead_inputs_do_not_break_the_factor():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    factor, damping = inverse_factor(hessian_of(x), 0.01)
    assert damping == 0.01
    assert torch.isfinite(factor).all()


def test_output_energy_is_the_sum_of_squared_outputs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(60, 8, generator=generator), torch.randn(5, 8, generator=generator)
    for stats, name in ((hessian_of(x), "hessian"), (LayerStats(60, sample=x), "sample")):
        assert stats.output_energy(weight) == pytest.approx((x @ weight.T).square().sum().item(), rel=1e-4)
        assert stats.measured_on == name
    assert LayerStats(0).output_energy(weight) == pytest.approx(weight.square().sum().item(), rel=1e-4)
    assert LayerStats(0).measured_on == "weights"
