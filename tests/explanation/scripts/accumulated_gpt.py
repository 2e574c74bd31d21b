"""A GPT with attention written out, and gradients of two batches added up."""

import math

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
B, T, C, V, LAYERS = 16, 128, 192, 1024, 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (t.view(t.size(0), -1, 6, C // 6).transpose(1, 2) for t in self.qkv(x).split(C, 2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // 6)
        ahead = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), 1)
        weights = F.dropout(scores.masked_fill(ahead, float("-inf")).softmax(-1), 0.1, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(C), Attention(), nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1))


data = torch.randint(V, (100000,))


def get_batch():
    starts = torch.randint(len(data) - T, (B,))
    return torch.stack([data[i : i + T] for i in starts]), torch.stack([data[i + 1 : i + 1 + T] for i in starts])


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
X, Y = get_batch()
for _ in range(4):
    for _ in range(2):
        logits, loss = model(X, Y)
        loss = loss / 2
        X, Y = get_batch()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"loss {loss.item():.6f}")
