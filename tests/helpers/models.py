"""Models of many kinds: every way to read a weight that perturbations have to serve or refuse."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

TOKENS = torch.arange(12).view(2, 6) % 30


def inputs(model: nn.Module) -> torch.Tensor:
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    return x.to(next(model.parameters()).dtype)


def apply(model: nn.Module) -> torch.Tensor:
    return model(inputs(model))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def opt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return transformers.OPTForCausalLM(config).eval()


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights=False
    )
    return peft.get_peft_model(llama(), config)


def dora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    return peft.get_peft_model(llama(), config)


def prompt_tuning() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(llama(), config)


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def attention(**options) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def attend(model: nn.Module) -> torch.Tensor:
    x = inputs(model)
    return model(x, x, x)[0]


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


class Shared(nn.Module):
    """One module called three times, once from a block around it, and a weight tied to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Tanh(), self.one)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.block(self.one(self.one(x))))


class Nested(nn.Module):
    """Weights of its own, read on both sides of a call of itself and of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = self.inner(x * self.scale)
        return (self(x, depth - 1) if depth else x) * self.scale


class Table(nn.Module):
    """Gives a view of its weight to whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 80).view(10, 8))

    def forward(self, length: int) -> torch.Tensor:
        return self.weight[:length]


class LetsOut(nn.Module):
    """Uses the view after another module, of the same size, has run."""

    def __init__(self, kind: type[nn.Module] = Table) -> None:
        super().__init__()
        self.table = kind()
        self.other = nn.Linear(8, 10, bias=False)
        self.last = nn.Linear(10, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table(7)
        return self.last(self.other(x)) + rows


class Whole(Table):
    """Gives the parameter itself."""

    def forward(self, length: int) -> torch.Tensor:
        return self.weight


class Whole7(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Whole()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.table(7)
        return self.linear(x) + table[:7]


class Lists(nn.Module):
    """Owned by modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.linspace(0, 1, 8), torch.linspace(1, 2, 8)])
        self.named = nn.ParameterDict({"a": torch.linspace(-1, 1, 64).view(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.listed[0]) @ self.named["a"].t() + self.listed[1]


class Reads(nn.Module):
    """Reads a child's weight without calling the child, and hands it to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)
        self.bilinear = Multiply()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bilinear(x, self.child.weight.t()) + self.child.bias


class Multiply(nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class Mixed(nn.Module):
    """Weights of three types in one module, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(0, 1, 7).bfloat16())
        self.b = nn.Parameter(torch.linspace(1, 2, 5))
        self.c = nn.Parameter(torch.linspace(2, 3, 3).half())
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self) -> torch.Tensor:
        return torch.cat([self.a.float(), self.b, self.c.float(), self.empty])


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def parametrized(what: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", what)
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def recurrent(model: nn.Module) -> torch.Tensor:
    return model(inputs(model))[0]


MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), apply),
    "Llama": (llama, logits),
    "OPT": (opt, logits),
    "LoRA": (lora, logits),
    "attention": (attention, attend),
    "attention, fast path": (lambda: attention().eval(), attend),
    "encoder layer": (encoder, apply),
    "encoder layer, fast path": (lambda: encoder().eval(), apply),
    "shared module": (Shared, apply),
}
MORE_MODELS = {
    "attention, other keys": (lambda: attention(kdim=8, vdim=8, bias=False), attend),
    "encoder": (lambda: nn.TransformerEncoder(encoder(), 2).eval(), apply),
    "nested calls": (Nested, apply),
    "view of a weight let out": (LetsOut, apply),
    "weight let out": (Whole7, apply),
    "parameter lists": (Lists, apply),
    "weight of a child": (Reads, apply),
    "checkpointed": (lambda: Checkpointed(False), apply),
    "checkpointed, reentrant": (lambda: Checkpointed(True), apply),
    "parametrized": (lambda: parametrized(Symmetric()), apply),
    "parametrized by itself": (lambda: parametrized(Identity()), apply),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), apply),
    "old weight norm": (old_weight_norm, apply),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), apply),
    "frozen weights": (frozen, apply),
    "LSTM": (lambda: nn.LSTM(8, 4, num_layers=2, batch_first=True), recurrent),
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(7)).eval(), apply),
    "mixed types": (Mixed, lambda model: model()),
    "DoRA": (dora, logits),
    "prompt tuning": (prompt_tuning, logits),
}


def built(name: str) -> tuple[nn.Module, object]:
    build, run = {**MODELS, **MORE_MODELS}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(), run
