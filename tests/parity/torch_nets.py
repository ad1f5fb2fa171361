"""The papers' networks in plain PyTorch, and weights carried between them and ours, both ways.

Written from the descriptions of the architectures, layer names as in `fedjax_sim.models`, so that a state
dict and a variables pytree differ only in layout. Needs torch; import it behind `pytest.importorskip`.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class LeNet(nn.Module):
    """FedMR's CIFAR CNN."""

    flattened: ClassVar = {"fc1": (16, 5, 5)}  # layer that reads a flattened map -> (C, H, W) of that map

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class FemnistCNN(nn.Module):
    """FedMR's FEMNIST CNN: pooling before ReLU."""

    flattened: ClassVar = {"fc1": (32, 4, 4)}

    def __init__(self, num_classes: int, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(512, 256)
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x):
        x = torch.relu(functional.max_pool2d(self.conv1(x), 2))
        x = torch.relu(functional.max_pool2d(self.conv2(x), 2))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class PreActivationBottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        width = 4 * planes
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, width, 1, bias=False)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)

    def forward(self, x):
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        y = self.conv3(torch.relu(self.norm3(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class ResNet20(nn.Module):
    """FedMR's ResNet-20; `femnist` adds the pooling after the stem. The last norm is never applied."""

    flattened: ClassVar = {}

    def __init__(self, num_classes: int, channels: int = 3, femnist: bool = False):
        super().__init__()
        self.femnist = femnist
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.blocks, inputs = [], 16
        for stage, planes in enumerate((16, 32, 64), start=1):
            for block in range(2):
                name = f"stage{stage}_block{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                self.add_module(name, PreActivationBottleneck(inputs, planes, stride))
                self.blocks.append(name)
                inputs = 4 * planes
        self.unused_norm = nn.BatchNorm2d(256)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        if self.femnist:
            x = functional.max_pool2d(x, 3, stride=1, padding=1)
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = functional.avg_pool2d(x, 7 if self.femnist else 8)
        return self.fc(x.flatten(1))


class VGG11BN(nn.Module):
    """LIPS's five-convolution "vgg11_bn"."""

    flattened: ClassVar = {"fc1": (512, 1, 1)}

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        for i, width in enumerate((64, 128, 256, 512, 512), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
            channels = width
        self.fc1 = nn.Linear(512, num_classes)

    def forward(self, x):
        for i in range(1, 6):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
            x = functional.max_pool2d(torch.relu(x), 2)
        return self.fc1(x.flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)
            self.norm_shortcut = nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + (self.norm_shortcut(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class ResNet8(nn.Module):
    """LIPS's ResNet-8: 7×7 stem, pooling, one basic block in each of three stages."""

    flattened: ClassVar = {}

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.BatchNorm2d(64)
        self.stage1_block0 = BasicBlock(64, 64, 1)
        self.stage2_block0 = BasicBlock(64, 128, 2)
        self.stage3_block0 = BasicBlock(128, 256, 2)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.stage3_block0(self.stage2_block0(self.stage1_block0(x)))
        return self.fc(x.mean((2, 3)))


class VGG16Mnist(nn.Module):
    """FedMR's "VGG16_mnist"."""

    flattened: ClassVar = {"fc1": (512, 7, 7)}

    def __init__(self, num_classes: int, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 1, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 512, 3, padding=1)
        self.fc1 = nn.Linear(25088, 256)
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = torch.relu(self.conv3(functional.max_pool2d(x, 2, stride=1)))
        x = torch.relu(self.conv4(functional.max_pool2d(x, 2, stride=1)))
        x = functional.max_pool2d(torch.relu(self.conv5(x)), 2)
        x = functional.adaptive_avg_pool2d(x, 7)
        return self.fc2(self.fc1(x.flatten(1)))


_BUFFERS = {"mean": "running_mean", "var": "running_var"}


def images(x: np.ndarray) -> torch.Tensor:
    """f32[B, H, W, C] -> a tensor (B, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def load(net: nn.Module, variables: dict[str, Any]) -> None:
    """Copies our variables into `net`. Every tensor must be there on both sides; counters are left alone."""
    state = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    for path, leaf in _leaves(variables.get("params", {})):
        layer, kind = ".".join(path[:-1]), path[-1]
        value = np.array(leaf)
        if kind == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif kind == "kernel":
            if layer in net.flattened:
                c, h, w = net.flattened[layer]
                value = value.reshape(h, w, c, -1).transpose(2, 0, 1, 3).reshape(c * h * w, -1)
            value = value.T
        name = "bias" if kind == "bias" else "weight"
        state[f"{layer}.{name}"] = torch.from_numpy(np.ascontiguousarray(value))
    for path, leaf in _leaves(variables.get("batch_stats", {})):
        state[".".join((*path[:-1], _BUFFERS[path[-1]]))] = torch.from_numpy(np.array(leaf))
    net.load_state_dict(state, strict=True)


def variables_of(net: nn.Module) -> dict[str, Any]:
    """`net`'s parameters and running statistics in our layout, NumPy float32."""
    return _pytree(net, net.state_dict())


def gradients_of(net: nn.Module) -> dict[str, Any]:
    """The parameters' gradients in our layout; zeros where PyTorch left None."""
    named = dict(net.named_parameters())
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    return _pytree(net, grads)["params"]


def _pytree(net: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {"params": {}}
    for name, tensor in tensors.items():
        *layer, kind = name.split(".")
        if kind == "num_batches_tracked":
            continue
        value = tensor.detach().numpy().copy()
        collection = "params"
        if kind.startswith("running_"):
            collection, key = "batch_stats", kind.removeprefix("running_")
        elif kind == "bias":
            key = "bias"
        elif value.ndim == 1:
            key = "scale"
        elif value.ndim == 4:
            key, value = "kernel", value.transpose(2, 3, 1, 0)
        else:
            key, value = "kernel", value.T
            if ".".join(layer) in net.flattened:
                c, h, w = net.flattened[".".join(layer)]
                value = value.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(c * h * w, -1)
        node = out.setdefault(collection, {})
        for part in layer:
            node = node.setdefault(part, {})
        node[key] = value
    return out


def _leaves(tree: Any, path: tuple[str, ...] = ()):
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
