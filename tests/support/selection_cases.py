"""A minibatch with known per-sample gradients, and every rule that there is."""

import torch

import selbp
from selbp.selectors import BatchStatistics, GradientProxies

EVERY_RULE = [
    selbp.Full(),
    selbp.Random(),
    selbp.TopLoss(),
    selbp.TopLoss(weights="batch"),
    selbp.TopLoss(weights="refit"),
    selbp.TopGradNorm(),
    selbp.TopGradNorm(weights="refit"),
    selbp.LossPercentile(),
    selbp.LossPercentile(p_min=0.05, weights="unbiased"),
    selbp.LossRank(),
    selbp.LossRank(weights="unbiased"),
    selbp.GradNormImportance(),
    selbp.GradNormImportance(norm="gradient"),
    selbp.GradNormImportance(replacement=True),
    selbp.GradNormImportance(threshold="rows", weights="mean"),
    selbp.GradientMatching(),
    selbp.GradientMatching(rule="raw", nonnegative=False),
    selbp.GradientMatching(rule="normalized", weights="mean"),
    selbp.GradientMatching(unit_sum=1.0),
    selbp.CubeSampling(),
    selbp.CubeSampling(dimensions=3, probabilities="uniform"),
    selbp.DivBS(),
    selbp.ReducibleLoss(),
    selbp.ReducibleLoss(weights="refit"),
]


class Batch:
    """n samples: factors, gradients (n, C (d + 1)) formed outright, statistics, and their mean over n."""

    def __init__(self, n=64, classes=5, d=7, *, valid=None, dtype=torch.float64, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        norms = torch.rand(n, 1, generator=generator, dtype=torch.float64).square() + 0.05
        residual = torch.randn(n, classes, generator=generator, dtype=torch.float64) * norms
        features = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
        loss = residual.norm(dim=1) + 0.1 * torch.rand(n, generator=generator, dtype=torch.float64)
        self.valid = torch.ones(n, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
        residual[~self.valid] = 0.0
        loss[~self.valid] = torch.nan
        self.residual, self.features, self.loss = (x.to(dtype).to(device) for x in (residual, features, loss))
        self.irreducible = 0.2 * torch.rand(n, generator=generator, dtype=torch.float64).to(dtype).to(device)
        self.refresh()

    def refresh(self):
        """Recompute what follows from the factors, after a test changed them."""
        r, h = self.residual, self.features
        ones = torch.ones_like(h[:, :1])
        self.gradients = (r[:, :, None] * torch.cat([h, ones], 1)[:, None, :]).flatten(1)
        self.mean = self.gradients.sum(0) / len(r)
        self.stats = BatchStatistics(
            self.loss, self.loss, r.square().sum(1), h.square().sum(1) + 1.0, self.valid, self.valid.to(r.device)
        )
        self.extras = {"irreducible_loss": self.irreducible}

    @property
    def proxies(self):
        return GradientProxies(self.residual, self.features)

    def select(self, selector, k, **options):
        return selector.select(self.stats, k, proxies=self.proxies, extras=self.extras, **options)
