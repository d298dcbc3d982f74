"""CBAM as people write it in plain PyTorch, and what a module keeps for its backward pass.

Benchmarks and tests compare with these.
"""

import itertools

import torch
from torch.nn import functional as F


class PlainCBAM(torch.nn.Module):
    """CBAM as people write it in plain PyTorch, the reference for memory and speed."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(channels, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, channels)
        )
        self.conv = torch.nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = torch.nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x):
        avg, top = F.adaptive_avg_pool2d(x, 1).flatten(1), F.adaptive_max_pool2d(x, 1).flatten(1)
        x = x * torch.sigmoid(self.mlp(avg) + self.mlp(top))[:, :, None, None]
        planes = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.bn(self.conv(planes)))


def saved_share(module, x):
    """The bytes saved for the backward pass, without x itself, as a share of the bytes of x. A storage counts once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(module.parameters(), module.buffers())}
    storages = {k: v for k, v in storages.items() if k not in own and k != x.untyped_storage().data_ptr()}
    del y
    return sum(storages.values()) / (x.numel() * x.element_size())
