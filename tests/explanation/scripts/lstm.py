"""A forecaster: an LSTM over long windows, with a trainer class that has the loop."""

import torch
from torch import nn


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, 1)

    def forward(self, window):
        states, _ = self.lstm(window)
        return self.head(states[:, -1])


class Training:
    def __init__(self):
        self.model = Forecaster()
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=1e-3)
        self.loss_fn = nn.HuberLoss()

    def run(self, windows, targets):
        for window, target in zip(windows, targets, strict=True):
            prediction = self.model(window)
            loss = self.loss_fn(prediction, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            print(f"loss {loss.item():.6f}")


torch.manual_seed(0)
Training().run(torch.randn(3, 64, 120, 4), torch.randn(3, 64, 1))
