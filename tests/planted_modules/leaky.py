"""Attention without a mask, rows that are normalised together, and a config that is a dictionary."""

import torch
from torch import nn


class Mixer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_query = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.W_key = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.W_value = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)

    def forward(self, x):
        scores = self.W_query(x) @ self.W_key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return torch.softmax(scores, dim=-1) @ self.W_value(x)  # HERE: no mask


class LeakyModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.blocks = nn.Sequential(*[Mixer(cfg) for _ in range(cfg["n_layers"])])
        self.norm = nn.BatchNorm1d(cfg["emb_dim"])
        self.head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=cfg.get("bias", False))

    def forward(self, in_idx):
        x = self.blocks(self.embed(in_idx))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Encoder(nn.Module):
    """torch's own layers, called without their mask."""

    def __init__(self, vocab_size=64, d_model=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        layer = nn.TransformerEncoderLayer(d_model, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.fc = nn.Linear(d_model, vocab_size)

    def forward(self, x):
        return self.fc(self.encoder(self.embedding(x)))  # HERE: torch's
