"""Graph networks of torch-geometric (GCN or GAT), as they are and inside a budget: memory, time, bits.

python examples/geometric_graphs.py [gcn|gat] [--budget 5MiB]     needs: pip install torch-geometric
"""

from __future__ import annotations

import sys

import torch
from comparison import compare
from torch.nn import functional
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN

import tightfit

NODES, EDGES, CLASSES = 1000, 6000, 5
GRAPH = Data(
    x=torch.randn(NODES, 32),
    edge_index=torch.randint(0, NODES, (2, EDGES)),
    y=torch.randint(0, CLASSES, (NODES,)),
    train_mask=torch.arange(NODES) % 5 > 0,
)


def loss_of(model: torch.nn.Module, graph: Data) -> torch.Tensor:
    """Return the loss of those nodes that are trained on."""
    found = model(graph.x, graph.edge_index)
    return functional.cross_entropy(found[graph.train_mask], graph.y[graph.train_mask])


def train(budget: str | None) -> torch.nn.Module:
    """Eight epochs on the whole graph, with evaluation; the only difference is how the loss is called."""
    kind = GAT if KIND == "gat" else GCN
    model = kind(32, 64, num_layers=4, out_channels=CLASSES, dropout=0.2, norm="BatchNorm")
    optimizer = torch.optim.Adam(model.parameters())
    loss = loss_of
    if budget is not None:
        loss = tightfit.fit(model, GRAPH, budget=budget, loss=loss_of, optimizer=optimizer).loss
    for _ in range(8):
        model.train()
        loss(model, GRAPH).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(GRAPH.x, GRAPH.edge_index)
    return model


KIND = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in ("gcn", "gat") else "gcn"

if __name__ == "__main__":
    compare(train, budget="10MiB" if KIND == "gat" else "5MiB")
