"""Architectures as their users have them, small: a model, a batch of eight samples, and a loss per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

Case = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]
N, T, VOCABULARY = 8, 64, 2000
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
IMAGE = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip


def ids(length: int = T) -> Tensor:
    return torch.randint(3, VOCABULARY, (N, length))


def next_token(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].mT, x[:, 1:], reduction="none").sum(1)


def causal(model: Any) -> Case:
    return model, ids(), lambda m, x: next_token(m(input_ids=x, use_cache=False).logits, x)


def encoder_decoder(model: Any) -> Case:
    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = m(input_ids=batch[0], labels=batch[1], use_cache=False).logits
        return F.cross_entropy(logits.mT, batch[1], reduction="none").sum(1)

    return model, (ids(), ids()), loss


def classifier(model: Any) -> Case:
    mask = torch.ones(N, T, dtype=torch.long)
    mask[1, 40:] = 0
    batch = (ids(), mask, torch.randint(0, 2, (N,)))

    def loss(m: Any, b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(input_ids=b[0], attention_mask=b[1]).logits, b[2], reduction="none")

    return model, batch, loss


def images(model: Any) -> Case:
    batch = (torch.randn(N, 3, 64, 64), torch.randint(0, 2, (N,)))
    return model, batch, lambda m, b: F.cross_entropy(m(pixel_values=b[0]).logits, b[1], reduction="none")


def masked_tokens() -> Case:
    def loss(m: Any, x: Tensor) -> Tensor:
        return F.cross_entropy(m(input_ids=x).logits.mT, x, reduction="none").sum(1)

    return t.BertForMaskedLM(t.BertConfig(**TEXT)), ids(), loss


def mixtral(experts: str) -> Case:
    model = t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4))
    model.set_experts_implementation(experts)
    return causal(model)


def gpt_oss() -> Case:
    config = t.GptOssConfig(**TEXT, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    return causal(t.GptOssForCausalLM(config))


def adapter(kind: type[Any], **options: Any) -> Case:
    base = t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
    return causal(peft.get_peft_model(base, kind(target_modules=["q_proj", "v_proj"], **options)))


def deepseek() -> Case:
    config = t.DeepseekV3Config(
        **TEXT, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=96,
        first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    return causal(t.DeepseekV3ForCausalLM(config))


def recurrent_gemma() -> Case:
    config = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}
    sizes = {"num_key_value_heads": 1, "lru_width": 128, "attention_window_size": 32}
    return causal(t.RecurrentGemmaForCausalLM(t.RecurrentGemmaConfig(**config, **sizes)))


def clip_pairs() -> Case:
    """How well an image matches its own text, of two."""
    text = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 2, "eos_token_id": 2}
    config = t.CLIPConfig(text_config=text, vision_config={**IMAGE, "num_hidden_layers": 2}, projection_dim=64)
    batch = (torch.randn(N, 3, 64, 64), ids(16), ids(16))

    def loss(m: Any, b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        image = F.normalize(m.visual_projection(m.vision_model(pixel_values=b[0]).pooler_output))
        texts = [F.normalize(m.text_projection(m.text_model(input_ids=x).pooler_output)) for x in b[1:]]
        return F.softplus((image * (texts[1] - texts[0])).sum(1))

    return t.CLIPModel(config), batch, loss


def stack(layer: Callable[[int], nn.Module], pool: nn.Module, x: Tensor) -> Case:
    """Four layers of convolutions, the ``i``-th ``layer(i)``, and a classifier."""
    convolutions = [m for i in range(4) for m in (layer(i), nn.ReLU())]
    model = nn.Sequential(*convolutions, pool, nn.Flatten(), nn.Linear(64, 4))
    batch = (x, torch.randint(0, 4, (N,)))
    return model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation of its own, as image models have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.silu(x)


def inverted_bottlenecks() -> Case:
    """Four blocks as those of EfficientNet: widened, a convolution of each channel, and narrowed again."""

    def layer(i: int) -> nn.Module:
        before, width = 64 if i else 3, 128
        return nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), NormAct(width),
            nn.Conv2d(width, width, 3, padding=1, stride=2 if i < 2 else 1, groups=width, bias=False), NormAct(width),
            nn.Conv2d(width, 64, 1, bias=False), nn.BatchNorm2d(64),
        )  # fmt: skip

    return stack(layer, nn.AdaptiveAvgPool2d(1), torch.randn(N, 3, 64, 64))


def transformer_encoder() -> Case:
    """PyTorch's own encoder, whose attention uses its weights outside of any module of theirs."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions = nn.Embedding(VOCABULARY, 128), nn.Parameter(torch.randn(T, 128) / 50)
            layer = nn.TransformerEncoderLayer(128, 4, 384, 0.0, "gelu", batch_first=True, norm_first=True)
            self.layers, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(128, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.layers(self.table(x) + self.positions).mean(1))

    batch = (ids(), torch.randint(0, 2, (N,)))
    return Encoder(), batch, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")


def weight_norm() -> Case:
    def layer(i: int) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Conv1d(64 if i else 32, 64, 5, padding=2))

    return stack(layer, nn.AdaptiveAvgPool1d(1), torch.randn(N, 32, 256))


class StandardizedConv2d(nn.Conv2d):
    """Its weight has mean 0 and variance 1 for each output, as in normalizer-free networks."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w * torch.rsqrt(self.weight.var((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def standardized() -> Case:
    def layer(i: int) -> nn.Module:
        return StandardizedConv2d(64 if i else 3, 64, 3, padding=1)

    return stack(layer, nn.AdaptiveAvgPool2d(1), torch.randn(N, 3, 32, 32))


CASES: dict[str, Callable[[], Case]] = {
    "Llama": lambda: causal(t.LlamaForCausalLM(t.LlamaConfig(**TEXT))),
    "ResNet": lambda: images(
        t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic")
        )
    ),
    "OPT": lambda: causal(
        t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=VOCABULARY, hidden_size=128, ffn_dim=384, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=128, word_embed_proj_dim=128,
            )
        )
    ),
    "BART": lambda: encoder_decoder(
        t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=VOCABULARY, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=384, decoder_ffn_dim=384, max_position_embeddings=128,
                pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
            )
        )
    ),
    "T5": lambda: encoder_decoder(
        t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=384, num_layers=2, num_heads=4,
                decoder_start_token_id=0, pad_token_id=0,
            )
        )
    ),
    "BERT, masked tokens": masked_tokens,
    "DeBERTa-v2": lambda: classifier(
        t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(
                **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
                norm_rel_ebd="layer_norm", share_att_key=True,
            )
        )
    ),
    "XLNet": lambda: classifier(
        t.XLNetForSequenceClassification(
            t.XLNetConfig(vocab_size=VOCABULARY, d_model=128, n_layer=2, n_head=4, d_inner=384)
        )
    ),
    "Falcon": lambda: causal(
        t.FalconForCausalLM(
            t.FalconConfig(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
        )
    ),
    "Gemma 3": lambda: causal(
        t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=32, sliding_window=32))
    ),
    "Cohere": lambda: causal(t.CohereForCausalLM(t.CohereConfig(**TEXT))),
    "Mamba": lambda: causal(
        t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2))
    ),
    "ViT": lambda: images(t.ViTForImageClassification(t.ViTConfig(**IMAGE))),
    "DINOv2": lambda: images(
        t.Dinov2ForImageClassification(
            t.Dinov2Config(
                hidden_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8
            )
        )
    ),
    "nn.TransformerEncoder": transformer_encoder,
    "Inverted bottlenecks": inverted_bottlenecks,
    "Swin": lambda: images(
        t.SwinForImageClassification(
            t.SwinConfig(image_size=64, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[2, 4], window_size=4)
        )
    ),
    "ConvNeXt": lambda: images(
        t.ConvNextForImageClassification(t.ConvNextConfig(hidden_sizes=[48, 96], depths=[2, 2], num_stages=2))
    ),
    "Mixtral, grouped": lambda: mixtral("grouped_mm"),
    "Mixtral, expert by expert": lambda: mixtral("eager"),
    "gpt-oss": gpt_oss,
    "DeepSeek-V3": deepseek,
    "RecurrentGemma": recurrent_gemma,
    "CLIP, pairs": clip_pairs,
    "Llama with LoRA": lambda: adapter(peft.LoraConfig, r=8),
    "Llama with DoRA": lambda: adapter(peft.LoraConfig, r=8, use_dora=True),
    "Llama with LoHa": lambda: adapter(peft.LoHaConfig, r=8),
    "weight_norm, convolutions": weight_norm,
    "Standardized convolutions": standardized,
}  # fmt: skip
