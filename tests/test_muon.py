"""Muon against its definition, and a whole training with it."""

import pytest
import torch

from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 16, 16)])
def test_orthogonal_matrices(shape):
    """The singular vectors stay, the singular values become about 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, before, right = torch.linalg.svd(matrices, full_matrices=False)
    values = (left.mT @ orthogonal(matrices) @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert before.max() / before.min() > 2 and values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(left * values[..., None, :] @ right, orthogonal(matrices), atol=1e-4, rtol=0)


def test_it_equals_the_iteration_of_its_source():
    """Newton-Schulz on the matrix itself, as Jordan et al. write it."""
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    torch.testing.assert_close(orthogonal(matrix), x, atol=1e-5, rtol=0)


def test_zeros_stay():
    """Of a slice that was trained the update is that of the slice alone; a supernet's other weights stay."""
    slice_ = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(8, 12)
    whole[:4, :9] = slice_
    expected = torch.zeros(8, 12)
    expected[:4, :9] = orthogonal(slice_)
    torch.testing.assert_close(orthogonal(whole), expected, atol=1e-5, rtol=0)
    assert orthogonal(torch.zeros(5, 9)).abs().max() == 0


def test_a_step():
    """Kernels of dense convolutions get the orthogonalised momentum, all else what AdamW gives."""
    def layers():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8),
                                   torch.nn.Conv2d(8, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 2))

    ours, theirs = layers(), layers()
    kernel = ours[2].weight.detach().clone()
    optimizers = [Muon(ours.parameters(), 0.01, 0.1),
                  torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.1)]
    momentum = torch.zeros(6, 72)
    for step in range(3):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for network, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            network(images).square().sum().backward()
            if network is ours:
                gradient = ours[2].weight.grad.flatten(1).clone()
            optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonal(0.05 * gradient + 0.95 * momentum) * 0.2 * 72**0.5
        kernel = (1 - 0.01 * 0.1) * kernel - 0.01 * update.view(kernel.shape)
        torch.testing.assert_close(ours[2].weight.detach(), kernel)
        theirs[2].weight.data = kernel.clone()  # so that the gradients of the next step are the same
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_it_goes_on_from_its_state():
    def run(network, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            network(torch.full((2, 4, 5, 5), 1.0 + step)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole, first, second = (torch.nn.Conv2d(4, 4, 3) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    run(whole, Muon(whole.parameters()), range(4))
    optimizer = Muon(first.parameters())
    run(first, optimizer, range(2))
    second.load_state_dict(first.state_dict())
    again = Muon(second.parameters())
    again.load_state_dict(optimizer.state_dict())
    run(second, again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))
