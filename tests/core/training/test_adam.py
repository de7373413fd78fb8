import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defuse_core.training.adam import Adam
from defuse_core.training.checkpoint import load_optimizer_state, optimizer_state, train_step


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Conv2d(1, 4, 3), "last": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    net["first"].weight.data = net["first"].weight.data.to(memory_format=torch.channels_last)
    return net


def steps(net, optimizer, numbers):
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        images, labels = torch.randn(8, 1, 6, 6, generator=rng), torch.randint(3, (8,), generator=rng)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
        train_step(F.cross_entropy(net["last"](net["first"](images).mean((2, 3))), labels), optimizer)
    return [parameter.detach() for parameter in net.parameters()]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_its_steps_are_those_of_torch_to_the_bit(net):
    other = copy.deepcopy(net)
    found = steps(net, Adam(net.parameters(), 0.01), range(20))
    assert_equal(found, steps(other, torch.optim.Adam(other.parameters(), lr=0.01, fused=True), range(20)))


def test_its_state_is_that_of_torch_and_continues_to_the_bit(net):
    other = copy.deepcopy(net)
    optimizer, oracle = (
        Adam(net.parameters(), 0.01),
        torch.optim.Adam(other.parameters(), lr=0.01, fused=True),
    )
    steps(net, optimizer, range(10))
    steps(other, oracle, range(10))
    state, expected = optimizer_state(optimizer), optimizer_state(oracle)
    assert state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in state)
    resumed = Adam(net.parameters(), 0.01)
    load_optimizer_state(resumed, expected)
    assert_equal(steps(net, resumed, range(10, 20)), steps(other, oracle, range(10, 20)))
