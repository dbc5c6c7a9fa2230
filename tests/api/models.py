"""Small models of every kind, in float64: name -> (model, batch, number of samples, loss_fn)."""

from __future__ import annotations

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

N = 4


def squared(model, batch):
    out = model(*batch) if isinstance(batch, tuple) else model(batch)
    return out.square().flatten(1).sum(1) + out.flatten(1).sum(1)


def causal_lm(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    losses = F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    return losses.sum(1)


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def mlp():
    return nn.Sequential(
        nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)
    ), torch.randn(N, 7)


def sequence_mlp():
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 5)), torch.randn(N, 3, 7)


def grid_mlp():
    return nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.RMSNorm(6), nn.Linear(6, 5)), torch.randn(N, 3, 2, 7)


def rows_mlp():
    body = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
    return Lambda(lambda m, x: m.body(x.reshape(-1, 7)).reshape(len(x), -1), body=body), torch.randn(N, 3, 7)


def cnn():
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, (3, 2), groups=4, dilation=(1, 2), padding_mode="reflect", padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[4].running_mean.normal_()
        model[4].running_var.uniform_(0.5, 2)
    return model, torch.randn(N, 3, 9, 8)


def conv1d():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=2), nn.ReLU(), nn.Conv1d(6, 6, 4, groups=3, padding="same")
    ), torch.randn(N, 4, 11)


def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 1, 0)), nn.ReLU(), nn.Conv3d(4, 4, 2, groups=4)
    ), torch.randn(N, 2, 4, 5, 3)


def transposed_conv():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2, stride=2)), torch.randn(N, 2, 6, 6)


def attention(batch_first=True):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.mlp(self.norm(x))

    return Block(), torch.randn(N, 5, 8)


def encoder_layer():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2), torch.randn(
        N, 5, 8
    )


def lstm():
    return Lambda(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(5, 6, batch_first=True), head=nn.Linear(6, 3)
    ), torch.randn(N, 4, 5)


def gru():
    return Lambda(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.GRU(5, 6, batch_first=True), head=nn.Linear(6, 3)
    ), torch.randn(N, 4, 5)


def called_twice():
    return Lambda(
        lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(6, 6), b=nn.Linear(6, 2)
    ), torch.randn(N, 3, 6)


def checkpointed(reentrant):
    def forward(m, x):
        h = m.stem(x)
        for block in m.blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return m.head(h)

    blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6)) for _ in range(2))
    return Lambda(forward, stem=nn.Linear(5, 6), blocks=blocks, head=nn.Linear(6, 2)), torch.randn(N, 3, 5)


def two_inputs():
    return Lambda(lambda m, x, y: m.c(m.a(x) * m.b(y)), a=nn.Linear(4, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 2)), (
        torch.randn(N, 4),
        torch.randn(N, 5),
    )


def raw_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 3, 6))
            self.scale = nn.Parameter(torch.randn(6))
            self.gain = nn.Parameter(torch.tensor(1.5))
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return self.linear((x + self.position) * self.scale) * self.gain

    return Model(), torch.randn(N, 3, 6)


def shared_positions():
    """nanoGPT's form: positions are ids [T] without a sample dimension; here T == N, the treacherous case."""

    def forward(m, ids):
        return m.head(m.tokens(ids) + m.positions(torch.arange(ids.shape[1], device=ids.device)))

    return Lambda(
        forward, tokens=nn.Embedding(11, 6, padding_idx=0), positions=nn.Embedding(N, 6), head=nn.Linear(6, 3)
    ), torch.randint(0, 11, (N, N))


def functional_weight():
    """The output layer reads the embedding's weight without calling the module."""
    return Lambda(
        lambda m, ids: F.linear(torch.tanh(m.tokens(ids)), m.tokens.weight), tokens=nn.Embedding(9, 5)
    ), torch.randint(0, 9, (N, 3))


def tied():
    model = Lambda(
        lambda m, ids: m.head(torch.tanh(m.tokens(ids))),
        tokens=nn.Embedding(9, 5),
        head=nn.Linear(5, 9, bias=False),
    )
    model.head.weight = model.tokens.weight
    return model, torch.randint(0, 9, (N, 3))


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3)), torch.randn(N, 5)


def regularized():
    return Lambda(lambda m, x: m.a(x) + m.a.weight.square().sum(), a=nn.Linear(5, 4)), torch.randn(N, 5)


def unused():
    return Lambda(lambda m, x: m.a(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4)), torch.randn(N, 5)


def frozen():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model, torch.randn(N, 5)


def compiled():
    return torch.compile(mlp()[0], backend="aot_eager"), torch.randn(N, 7)


def patched():
    """Windows folded into the leading dimension: [N * windows, T, d]."""
    return Lambda(
        lambda m, x: m.b(torch.relu(m.a(x.reshape(N * 2 if len(x) == N else 2, 3, 5))).reshape(len(x), -1)),
        a=nn.Linear(5, 4),
        b=nn.Linear(24, 2),
    ), torch.randn(N, 6, 5)


PLAIN = {
    f.__name__: f
    for f in (
        mlp,
        sequence_mlp,
        grid_mlp,
        rows_mlp,
        cnn,
        conv1d,
        conv3d,
        transposed_conv,
        attention,
        encoder_layer,
        lstm,
        gru,
        called_twice,
        two_inputs,
        raw_parameters,
        shared_positions,
        functional_weight,
        tied,
        parametrized,
        regularized,
        unused,
        frozen,
        compiled,
        patched,
    )
} | {
    "checkpoint_reentrant": functools.partial(checkpointed, True),
    "checkpoint": functools.partial(checkpointed, False),
}


def hugging_face(name):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers as t

    ids = torch.randint(1, 40, (N, 6))
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        return t.GPT2LMHeadModel(config), {"input_ids": ids}, causal_lm
    if name == "llama":
        config = t.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
        return t.LlamaForCausalLM(config), {"input_ids": ids}, causal_lm
    if name == "bert":
        config = t.BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        model = t.BertForSequenceClassification(config)
        mask = torch.ones(N, 6, dtype=torch.long)
        mask[1, 4:] = 0

        def loss_fn(model, batch):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return F.cross_entropy(logits, batch["labels"], reduction="none")

        return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (N,))}, loss_fn
    if name == "lora":
        import peft

        base, batch, loss_fn = hugging_face("gpt2")
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], lora_dropout=0.0, fan_in_fan_out=True),
        )
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p.normal_(std=1 / math.sqrt(16))
        return model, batch, loss_fn
    raise KeyError(name)


HUGGING_FACE = ("gpt2", "llama", "bert", "lora")


def build(name):
    torch.manual_seed(1)
    if name in PLAIN:
        model, batch = PLAIN[name]()
        loss_fn = squared
    else:
        model, batch, loss_fn = hugging_face(name)
    from dropinf.workload import map_tensors

    model = model.double().eval()
    batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    return model, batch, loss_fn
