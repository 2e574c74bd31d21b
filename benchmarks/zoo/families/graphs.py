"""Graph networks of torch-geometric, on a random graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.subject import Subject, mean_square

NODES, EDGES, WIDTH = 400, 2400, 32

#: Convolutions that take node features and edges and nothing else.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ChebConv": {"K": 3},
    "TAGConv": {"K": 3},
    "ARMAConv": {"num_stacks": 2, "num_layers": 2},
    "GATConv": {"heads": 4, "concat": False},
    "GATv2Conv": {"heads": 4, "concat": False},
    "TransformerConv": {"heads": 4, "concat": False},
    "SuperGATConv": {"heads": 4, "concat": False},
    "FeaStConv": {"heads": 4},
    "GENConv": {"num_layers": 2},
    "EGConv": {"num_heads": 4},
    "MixHopConv": {},
}


class Stack(nn.Module):
    """Residual layers of one kind of convolution."""

    def __init__(self, make: Any, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(make()) for _ in range(depth))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return x


class _Layer(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm1d(WIDTH), convolution

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        result: Tensor = x + F.dropout(F.relu(self.convolution(self.norm(x), edges)), 0.1, self.training)
        return result


def build(family: str, name: str) -> Subject:
    import torch_geometric.nn as geometric

    batch = torch.randn(NODES, WIDTH), torch.randint(0, NODES, (2, EDGES))
    if name in ("SchNet", "DimeNet", "DimeNetPlusPlus"):
        return _molecules(name)
    if name == "PNA":
        degrees = torch.bincount(torch.bincount(batch[1][1], minlength=NODES))
        model: nn.Module = geometric.PNA(
            WIDTH, WIDTH, 4, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"], deg=degrees
        )
    elif name == "GraphUNet":
        model = geometric.GraphUNet(WIDTH, WIDTH, WIDTH, depth=3)
    elif name == "AttentiveFP":
        model = geometric.AttentiveFP(WIDTH, WIDTH, 4, 8, num_layers=4, num_timesteps=2)
        batch = (*batch, torch.randn(EDGES, 8), torch.arange(NODES) % 8)
    elif name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        model = getattr(geometric, name)(WIDTH, WIDTH, 4, dropout=0.1, norm="batch_norm")
    else:
        kind = getattr(geometric, name)
        model = Stack(lambda: kind(WIDTH, WIDTH, **_OPTIONS.get(name, {})))
    return Subject.single(model, batch, mean_square)


def _molecules(name: str) -> Subject:
    """Energies of random molecules of 12 atoms."""
    import torch_geometric.nn as geometric

    molecules, atoms = 4, 12
    molecule = torch.arange(molecules).repeat_interleave(atoms)
    places = torch.randn(molecules * atoms, 3) * 2
    # Those of torch-geometric look for neighbours with an extension that is not on the package index.
    pairs = (molecule[:, None] == molecule) & ~torch.eye(len(molecule), dtype=torch.bool)
    edges = pairs.nonzero().t().contiguous()

    def neighbours(at: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return edges, (at[edges[0]] - at[edges[1]]).norm(dim=-1)

    model = geometric.SchNet(hidden_channels=32, num_filters=32, num_interactions=4, interaction_graph=neighbours)
    return Subject.single(model, (torch.randint(1, 10, (molecules * atoms,)), places, molecule), mean_square)
