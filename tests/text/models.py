"""Small models of text of several architectures, each with a tokenizer of words."""

from __future__ import annotations

import functools

import pytest
import torch

from dropinf.text.passages import Passage

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCE = "the cat sat on a mat while two dogs ran far away from home in heavy rain"
WORDS = SENTENCE.split()
SIZES = (3, 9, 2, 14, 5, 5, 11, 2)
TEXTS = [" ".join(WORDS[(7 * i + 5 * j + i * j) % len(WORDS)] for j in range(n)) for i, n in enumerate(SIZES)]
PASSAGES = [Passage(f"p{i}", text, i % 3) for i, text in enumerate(TEXTS)]
IDS = [p.id for p in PASSAGES]
VOCABULARY = 24
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}


def build(name: str, **changes):
    t = transformers
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**SMALL | {"num_key_value_heads": 1} | changes))
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**GPT2 | changes))
    if name == "mistral":
        return t.MistralForCausalLM(
            t.MistralConfig(**SMALL | {"num_key_value_heads": 1, "sliding_window": 8} | changes)
        )
    if name == "gemma2":
        return t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL | {"num_key_value_heads": 1, "head_dim": 6} | changes))
    if name == "bloom":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2))
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**SMALL | {"num_labels": 3} | changes))
    if name == "roberta":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**SMALL | {"num_labels": 3} | changes))
    assert name == "gpt2 classifier"
    return t.GPT2ForSequenceClassification(t.GPT2Config(**GPT2 | {"num_labels": 3} | changes))


def folders_in(tmp_path_factory):
    """A folder with a model and its tokenizer, by name, and by whether that has a padding token; made once."""

    @functools.cache
    def folder(name: str, pad: bool = False, **changes) -> str:
        path = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        build(name, **changes).save_pretrained(path)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if pad else {})
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=list(special.values()))
        words.train_from_iterator([SENTENCE], trainer)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
        return str(path)

    return folder
