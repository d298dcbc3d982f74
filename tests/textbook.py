"""The paper's equations once more, written straight from the page and sharing no code with the package."""

import torch
from torch.nn import functional as F


def pool(x, kind):
    n, c = x.shape[:2]
    flat = x.reshape(n, c, -1)
    if kind == 'avg':
        return flat.sum(-1) / flat.shape[-1]
    if kind == 'max':
        return torch.stack([torch.stack([row.max() for row in image]) for image in flat])
    if kind == 'lp':
        return (flat**2).sum(-1).sqrt()
    return flat.exp().sum(-1).log()


def channel_map(x, weights, pools, gate):
    total = 0
    for kind in pools:
        hidden = (pool(x, kind) @ weights['channel.fc1.weight'].T + weights['channel.fc1.bias']).clamp(min=0)
        total = total + hidden @ weights['channel.fc2.weight'].T + weights['channel.fc2.bias']
    return squash(total, gate)[:, :, None, None]


def spatial_map(x, weights, spatial, gate, training):
    if spatial == 'pool':
        planes = torch.stack([x.amax(1), x.mean(1)], 1)
    else:
        planes = (x * weights['spatial.reduce.weight'].reshape(1, -1, 1, 1)).sum(1, keepdim=True)
    kernel = weights['spatial.conv.weight']
    size = kernel.shape[-1]
    padded = F.pad(planes, [size // 2] * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (N, K, H, W, size, size)
    z = torch.einsum('nkhwij,kij->nhw', windows, kernel[0])[:, None]
    if training:
        mean, var = z.mean(), ((z - z.mean()) ** 2).mean()
    else:
        mean, var = weights['spatial.bn.running_mean'], weights['spatial.bn.running_var']
    z = (z - mean) / (var + 1e-5).sqrt() * weights['spatial.bn.weight'] + weights['spatial.bn.bias']
    return squash(z, gate)


def squash(z, gate):
    return (2 if gate == 'unit' else 1) / (1 + (-z).exp())


def cbam(x, weights, pools=('avg', 'max'), spatial='pool', order='channel-spatial', gate='sigmoid', training=False):
    """(N, C, H, W) -> the same; weights is CBAM's state dict."""

    def channel(x):
        return channel_map(x, weights, pools, gate)

    def where(x):
        return spatial_map(x, weights, spatial, gate, training) if spatial else torch.ones((), dtype=x.dtype)

    if order == 'parallel':
        return x * channel(x) * where(x)
    for attention in (channel, where) if order == 'channel-spatial' else (where, channel):
        x = x * attention(x)
    return x
