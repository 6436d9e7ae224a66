"""Programs in the style of the package's examples, unchanged but for one line in front, in a fresh process each.

They make the calls that its public examples and documentation pages make, in the same argument forms, on data of our
own, and check the results by formulas.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

INSTALL = (
    "from secorder_func.compat import install_as_torch_secorder; install_as_torch_secorder()\n"
)
HEAD = """
import math, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(7)
close = torch.testing.assert_close
"""

PROGRAMS = {
    "products with a model": """
from torch_secorder.core import gvp, hessian_diagonal, hvp
net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))
x, y = torch.randn(12, 6), torch.randn(12, 1)
v = [torch.randn_like(p) for p in net.parameters()]
product = hvp.model_hvp(net, F.mse_loss, x, y, v)
slope = gvp.model_jvp(net, x, v)
diagonal = hessian_diagonal(lambda: F.mse_loss(net(x), y), list(net.parameters()))
assert [h.shape for h in product] == [d.shape for d in diagonal] == [p.shape for p in net.parameters()]
assert slope.shape == (12, 1)
close(diagonal[-1], torch.tensor([2.0]))
close(diagonal[-2], 2 * net[1](net[0](x)).square().mean(0, keepdim=True))
""",
    "a model with a dict of outputs": """
from torch_secorder.core import gvp, hessian_diagonal, hvp
class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 1)
    def forward(self, x):
        h = torch.relu(self.body(x))
        return {"kind": self.kind(h), "size": self.size(h)}
class Head(nn.Module):
    def __init__(self, model, key):
        super().__init__()
        self.model, self.key = model, key
    def forward(self, x):
        return self.model(x)[self.key]
def loss(out, want):
    return F.cross_entropy(out["kind"], want["kind"]) + 0.1 * F.mse_loss(out["size"], want["size"])
model, x = TwoHeads(), torch.randn(9, 4)
want = {"kind": torch.randint(0, 2, (9,)), "size": torch.randn(9, 1)}
v = [torch.randn_like(p) for p in model.parameters()]
product = hvp.model_hvp(model, loss, x, want, v)
close(product[-1], 0.2 * gvp.model_jvp(Head(model, "size"), x, v).mean(0))
assert gvp.model_jvp(Head(model, "kind"), x, v).shape == (9, 2)
diagonal = hessian_diagonal(lambda: loss(model(x), want), list(model.parameters()))
close(diagonal[-1], torch.tensor([0.2]))
""",
    "the quick start": """
from torch_secorder.core import gvp, hvp
model, x, y = nn.Linear(10, 1), torch.randn(1, 10), torch.randn(1, 1)
params, mse = list(model.parameters()), nn.MSELoss()
v = [torch.randn_like(p) for p in params]
exact = hvp.model_hvp(model, mse, x, y, v)
near = hvp.approximate_hvp(lambda: mse(model(x), y), params, v, num_samples=10)
for a, b in zip(exact, near):
    close(a, b, rtol=1e-2, atol=1e-2)
close(gvp.model_jvp(model, x, v), x @ v[0].T + v[1])
back = gvp.model_vjp(model, x, torch.full((1, 1), 2.0))
close(back[0], 2 * x)
vs = [torch.stack([t, 2 * t]) for t in v]
rows = gvp.batch_jvp(lambda: model(x), params, vs)
close(rows[1], 2 * rows[0])
close(rows[0], gvp.model_jvp(model, x, v))
close(gvp.full_jacobian(lambda: model(x), params)[0], x)
for a, b in zip(hvp.gauss_newton_product(model, mse, x, y, v), exact):
    close(a, b)
trace = hvp.hessian_trace(lambda: mse(model(x), y), params, num_samples=2000, sparse=True)
assert abs(trace - 2 * (x.square().sum() + 1)) < 0.5 * trace
""",
    "curvature of each layer": """
from torch_secorder.core.per_layer_curvature import (
    get_layer_curvature_stats, per_layer_fisher_diagonal, per_layer_hessian_diagonal
)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 1)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
net, x, y = Net(), torch.randn(8, 6), torch.randn(8, 1)
fisher = per_layer_fisher_diagonal(net, F.mse_loss, x, y)
hessian = per_layer_hessian_diagonal(net, nn.MSELoss(), x, y)
assert {n: tuple(d.shape) for n, d in fisher.items()} == {"a": (28,), "b": (5,)}
close(fisher["b"][-1], (2 * (net(x) - y).mean()).square().detach())
close(hessian["b"][-1], torch.tensor(2.0))
stats = get_layer_curvature_stats(hessian)
print({name: f"{s['mean']:.4f} {s['std']:.4f} {s['max']:.4f} {s['min']:.4f}" for name, s in stats.items()})
assert stats["b"]["max"] == float(hessian["b"].max())
""",
    "parameters as a vector": """
from torch_secorder.core.utils import (
    flatten_params, get_param_shapes, get_params_by_module_type, get_params_by_name_pattern, unflatten_params
)
params = [torch.randn(2, 3), torch.randn(5)]
flat = flatten_params(params)
pieces = unflatten_params(flat, get_param_shapes(params))
assert flat.shape == (11,) and all(torch.equal(a, b) for a, b in zip(params, pieces))
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(4, 2))
assert list(get_params_by_module_type(net, [nn.Linear, nn.Conv2d])) == ["0", "2"]
assert len(get_params_by_name_pattern(net, "weight")) == 2
""",
    "steps of a natural gradient": """
from torch_secorder.approximations.fisher_diagonal import empirical_fisher_diagonal
model, mse = nn.Linear(2, 1), nn.MSELoss()
x = torch.randn(60, 2)
y = x @ torch.tensor([[1.0], [-2.0]]) + 0.5
first = mse(model(x), y).item()
for _ in range(40):
    model.zero_grad()
    mse(model(x), y).backward()
    fisher = empirical_fisher_diagonal(model, mse, x, y)
    with torch.no_grad():
        for p, f in zip(model.parameters(), fisher):
            p.grad.data.div_(f.sqrt().clamp(min=1e-6))
            p.data -= 0.03 * p.grad
assert mse(model(x), y).item() < 0.1 * first
""",
    "variances of a posterior": """
from torch_secorder.approximations import empirical_fisher_diagonal, generalized_fisher_diagonal
from torch_secorder.approximations.fisher_trace import empirical_fisher_trace, generalized_fisher_trace
net, x, y = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(30, 5), torch.randn(30, 1)
fisher = empirical_fisher_diagonal(net, F.mse_loss, x, y)
with torch.no_grad():
    variances = [1.0 / (f + 1e-8) for f in fisher]
assert all((v > 0).all() and v.shape == p.shape for v, p in zip(variances, net.parameters()))
close(empirical_fisher_trace(net, F.mse_loss, x, y), sum(f.sum() for f in fisher).detach())
clf, labels = nn.Linear(5, 3), torch.randint(0, 3, (30,))
diagonal = generalized_fisher_diagonal(clf, clf(x), labels, loss_type="nll")
wrong = (torch.softmax(clf(x), -1) - F.one_hot(labels, 3)).sum(0).detach()
close(diagonal[1], wrong.square(), rtol=1e-4, atol=1e-4)
trace = generalized_fisher_trace(clf, clf(x), labels, loss_type="nll")
close(trace, sum(d.sum() for d in diagonal), rtol=1e-4, atol=1e-4)
""",
    "steps of a diagonal Gauss-Newton method": """
from torch_secorder.approximations.gauss_newton import gauss_newton_matrix_approximation
model, mse = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)), nn.MSELoss()
x = torch.randn(40, 2)
y = (x[:, 0] * x[:, 1]).unsqueeze(1)
diagonal = list(gauss_newton_matrix_approximation(model, mse, x, y))
close(diagonal[-1], torch.tensor([40.0]))
close(diagonal[-2], model[1](model[0](x)).square().sum(0, keepdim=True).detach())
first = mse(model(x), y).item()
for _ in range(60):
    model.zero_grad()
    mse(model(x), y).backward()
    diagonal = list(gauss_newton_matrix_approximation(model, mse, x, y))
    with torch.no_grad():
        for p, d in zip(model.parameters(), diagonal):
            p.data -= 0.1 * 20 * p.grad / d.clamp(min=1e-1)
assert mse(model(x), y).item() < first
""",
    "eigenvalues": """
from torch_secorder.analysis.eigensolvers import lanczos, model_eigenvalues, power_iteration
net, x, y = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(50, 2), torch.randn(50, 1)
def loss_fn(model, data, target):
    return F.mse_loss(model(data), target)
found = {}
for method in ("power_iteration", "lanczos"):
    values, vectors = model_eigenvalues(
        net, loss_fn, x, y, num_eigenvalues=2, method=method, num_iterations=200, tol=1e-6
    )
    assert values.shape == (2,) and len(vectors) == 2
    assert [u.shape for u in vectors[0]] == [p.shape for p in net.parameters()]
    found[method] = values
close(found["power_iteration"][:1], found["lanczos"][:1], rtol=1e-2, atol=1e-3)
A = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
for solver in (power_iteration, lanczos):
    values, vectors = solver(lambda v: A @ v, dim=2, num_iterations=1000, num_vectors=2, tol=1e-6)
    close(values, torch.tensor([3 + math.sqrt(2), 3 - math.sqrt(2)]), rtol=1e-3, atol=1e-3)
    close(vectors.T @ vectors, torch.eye(2), rtol=1e-3, atol=1e-3)
""",
    "surfaces of the loss": """
from torch_secorder.analysis.landscape import (
    compute_loss_surface_1d, compute_loss_surface_2d, create_random_direction
)
model, x, y = nn.Linear(2, 1), torch.randn(20, 2), torch.randn(20, 1)
d1, d2 = create_random_direction(model), create_random_direction(model)
close(torch.stack([u.norm() for u in d1]), torch.ones(2))
here = F.mse_loss(model(x), y).detach()
alphas, losses = compute_loss_surface_1d(model, F.mse_loss, x, y, d1, alpha_range=(-2.0, 2.0), num_points=51)
assert alphas.shape == losses.shape == (51,)
close(losses[25], here)
a, b, surface = compute_loss_surface_2d(model, F.mse_loss, x, y, d1, d2, num_points=25)
assert a.shape == b.shape == (25,) and surface.shape == (25, 25)
close(surface[12, 12], here)
print(alphas[:5].tolist(), surface[:3, :3].tolist(), alphas.numpy()[0], surface.numpy()[0, 0])
""",
    "one after the other": """
from torch_secorder import (
    compute_loss_surface_1d, empirical_fisher_diagonal, estimate_eigenvalues, flatten_params, hessian_diagonal,
)
from torch_secorder.analysis import create_random_direction
net, x, y = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(16, 6), torch.randint(0, 2, (16,))
params = list(net.parameters())
before = flatten_params(params).detach().clone()
for found in (
    hessian_diagonal(lambda: F.cross_entropy(net(x), y), params),
    empirical_fisher_diagonal(net, F.cross_entropy, x, y),
):
    assert isinstance(found, list) and flatten_params(found).shape == before.shape
values, _ = estimate_eigenvalues(
    net, lambda m, a, b: F.cross_entropy(m(a), b), x, y,
    num_eigenvalues=3, method="lanczos", num_iterations=20, tol=1e-4,
)
assert values.numel() == 3
alphas, losses = compute_loss_surface_1d(net, F.cross_entropy, x, y, create_random_direction(net))
assert alphas.shape == losses.shape == (50,)
assert torch.equal(flatten_params(params), before)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_with_one_line_in_front(name: str) -> None:
    command = [sys.executable, "-W", "error", "-c", INSTALL + HEAD + PROGRAMS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_with_the_import_changed(name: str) -> None:
    changed = PROGRAMS[name].replace("torch_secorder", "secorder_func.compat")
    exec(HEAD + changed, {"__name__": "program"})
