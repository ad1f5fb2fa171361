"""Layer-peeled metrics in NumPy and float64, in the plainest form: what the compiled ones must agree with."""

import numpy as np


def traces(z, y, balanced=False):
    """(within, between, total) about class means; weighted by samples or every class alike."""
    classes = np.unique(y)
    means = np.stack([z[y == c].mean(0) for c in classes])
    spreads = np.asarray([((z[y == c] - m) ** 2).sum(1).mean() for c, m in zip(classes, means, strict=True)])
    weights = np.full(len(classes), 1 / len(classes))
    if not balanced:
        weights = np.asarray([(y == c).mean() for c in classes])
    centre = weights @ means
    return weights @ spreads, weights @ ((means - centre) ** 2).sum(1), ((z - z.mean(0)) ** 2).sum(1).mean()


def cdnv(z, y):
    classes = np.unique(y)
    means = [z[y == c].mean(0) for c in classes]
    spreads = [((z[y == c] - m) ** 2).sum(1).mean() for c, m in zip(classes, means, strict=True)]
    ratios = [
        (spreads[a] + spreads[b]) / (2 * ((means[a] - means[b]) ** 2).sum())
        for a in range(len(classes))
        for b in range(len(classes))
        if a != b
    ]
    return np.mean(ratios)


def principal_cosines(kernel, means, r):
    """Of a kernel (d, F) or (kh, kw, C, F), and class means (K, …, C) of its input."""
    wide = kernel if kernel.ndim == 2 else np.moveaxis(kernel, 2, 0).reshape(kernel.shape[2], -1)
    tall = np.moveaxis(means, -1, 0).reshape(means.shape[-1], -1)
    u, v = (np.linalg.svd(m, full_matrices=False)[0][:, :r] for m in (wide, tall))
    return np.clip(np.linalg.svd(u.T @ v, compute_uv=False), 0, 1)


def ridge_guess(z_fit, y_fit, z, classes, penalty=1e-2):
    """Predictions of the probe: standardised features, a bias column, one system of equations."""
    mean, scale = z_fit.mean(0), z_fit.std(0) + 1e-6
    a, b = (np.c_[(v - mean) / scale, np.ones(len(v))] for v in (z_fit, z))
    weights = np.linalg.solve(a.T @ a + penalty * len(a) * np.eye(a.shape[1]), a.T @ np.eye(classes)[y_fit])
    return (b @ weights).argmax(1)


def linear_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (np.linalg.norm(x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
