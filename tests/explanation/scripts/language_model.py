"""A language model as in PyTorch's examples: the LSTM's state goes from one window of the text to the next."""

import torch
import torch.nn.functional as F
from torch import nn


class RNNModel(nn.Module):
    def __init__(self, tokens, width, layers):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(tokens, width)
        self.rnn = nn.LSTM(width, width, layers, dropout=0.2)
        self.decoder = nn.Linear(width, tokens)

    def forward(self, source, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(source)), hidden)
        decoded = self.decoder(self.drop(output))
        return F.log_softmax(decoded.flatten(0, 1), dim=1), hidden


torch.manual_seed(0)
tokens, width, layers, window, batch_size = 1000, 64, 2, 35, 16
text = torch.randint(tokens, (4 * window + 1, batch_size))
model = RNNModel(tokens, width, layers)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
hidden = (torch.zeros(layers, batch_size, width), torch.zeros(layers, batch_size, width))
for i in range(0, len(text) - 1, window):
    source, target = text[i : i + window], text[i + 1 : i + 1 + window].reshape(-1)
    optimizer.zero_grad()
    hidden = tuple(state.detach() for state in hidden)
    output, hidden = model(source, hidden)
    loss = F.nll_loss(output, target)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
    print(f"loss {loss.item():.6f}")
