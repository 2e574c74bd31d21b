"""A GAN as in PyTorch's tutorial: two networks, two optimizers, three backwards for a step."""

import torch
from torch import nn

torch.manual_seed(0)
netG = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 784), nn.Tanh())
netD = nn.Sequential(nn.Linear(784, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))
criterion = nn.BCEWithLogitsLoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
for i in range(3):
    real = torch.rand(2048, 784)
    netD.zero_grad()
    errD_real = criterion(netD(real).view(-1), torch.ones(2048))
    errD_real.backward()
    noise = torch.randn(2048, 32)
    fake = netG(noise)
    errD_fake = criterion(netD(fake.detach()).view(-1), torch.zeros(2048))
    errD_fake.backward()
    optimizerD.step()
    netG.zero_grad()
    errG = criterion(netD(fake).view(-1), torch.ones(2048))
    errG.backward()
    optimizerG.step()
    print(f"D {(errD_real + errD_fake).item():.6f} G {errG.item():.6f}")
