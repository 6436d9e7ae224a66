from __future__ import annotations

import torch

from secorder_func.report import digits


def test_no_digit_is_in_both_parts() -> None:
    data = digits.load(num_train=1438, generator=torch.Generator().manual_seed(0))
    assert data.train_inputs.shape == (1438, 64)
    assert data.test_inputs.shape == (359, 64)
    every = torch.cat([data.train_inputs, data.test_inputs])
    assert len(every.unique(dim=0)) == 1797
    assert every.min() == 0
    assert every.max() == 1


def test_a_seed_fixes_the_split_and_the_initial_parameters_and_moves_no_global_state() -> None:
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        data = digits.load(num_train=10, generator=generator)
        model = digits.make_model(3, generator=generator)
        runs.append([data.train_inputs, data.test_labels, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_learns_to_read() -> None:
    generator = torch.Generator().manual_seed(0)
    data = digits.load(num_train=300, generator=generator)
    steps: list[int] = []
    model = digits.make_model(8, generator=generator)
    fit = digits.train(model, data, num_steps=60, advance=steps.append)
    assert sum(steps) == 60
    assert fit.train_accuracy > 0.9
    assert fit.test_accuracy > 0.8
